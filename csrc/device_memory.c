/* device_memory: where a device's memory comes from: its backend, or somebody else's allocator.
 *
 *     exec, weights, lanes -> [device_memory] -> PyTorch's allocator, or the backend's
 *
 * Another allocator hands out memory in the order of a stream of its own choice; here runs follow
 * any stream.  So memory is taken over after a wait for that stream, and given back after a wait
 * for all of the device, as cudaFree has it.  Both are rare: plans are made for many runs. */
#include "device.h"
#include "lock.h"

/* What came from the allocator and is not back yet. */
typedef struct block {
    void *memory, *handle;
} block;

struct ac_blocks {
    pthread_mutex_t lock;
    ac_memory from;
    block *block;
    int32_t count, capacity;
};

static ac_blocks *
blocks_of(ac_device *device)
{
    return __atomic_load_n(&device->blocks, __ATOMIC_ACQUIRE);
}

ac_status
ac_device_set_memory(ac_device *device, const ac_memory *memory)
{
    if (device->backend->wait == NULL || blocks_of(device)) {
        return AC_OK;
    }
    ac_blocks *made = ac_calloc(1, sizeof *made), *none = NULL;
    if (!made) {
        return ac_no_memory(sizeof *made);
    }
    pthread_mutex_init(&made->lock, NULL);
    made->from = *memory;
    if (!__atomic_compare_exchange_n(&device->blocks, &none, made, false, __ATOMIC_ACQ_REL,
                                     __ATOMIC_ACQUIRE)) { /* somebody was faster */
        pthread_mutex_destroy(&made->lock);
        ac_free(made);
    }
    return AC_OK;
}

void
ac_device_free_blocks(ac_device *device)
{
    ac_blocks *b = blocks_of(device);
    if (b) {
        pthread_mutex_destroy(&b->lock);
        ac_free(b->block);
        ac_free(b);
    }
}

static ac_status
reserve_locked(ac_blocks *b)
{
    if (b->count < b->capacity) {
        return AC_OK;
    }
    int32_t capacity = AC_MAX(2 * b->capacity, 64);
    block *grown = ac_realloc(b->block, (size_t)capacity * sizeof *grown);
    if (!grown) {
        return ac_no_memory((size_t)capacity * sizeof *grown);
    }
    b->block = grown;
    b->capacity = capacity;
    return AC_OK;
}

static ac_status
remember(ac_blocks *b, void *memory, void *handle)
{
    ac_lock(&b->lock);
    ac_status status = reserve_locked(b);
    if (status == AC_OK) {
        b->block[b->count++] = (block){memory, handle};
    }
    ac_unlock(&b->lock);
    return status;
}

/* The handle of memory that is from the allocator, now forgotten; NULL: it is the backend's. */
static void *
forget(ac_blocks *b, const void *memory)
{
    void *handle = NULL;
    ac_lock(&b->lock);
    for (int32_t i = b->count - 1; i >= 0 && !handle; i--) {
        if (b->block[i].memory == memory) {
            handle = b->block[i].handle;
            b->block[i] = b->block[--b->count];
        }
    }
    ac_unlock(&b->lock);
    return handle;
}

/* The backend says what there is, in its own words; a limit of the allocator may be lower. */
static ac_status
refused(ac_device *device, size_t bytes)
{
    void *memory;
    AC_TRY(device->backend->alloc(device->self, bytes, &memory));
    device->backend->free(device->self, memory);
    return ac_error(AC_E_MEMORY, "%s: out of memory: %zu bytes were asked for, which are free, but "
                                 "not for this process: see the limits of its allocator",
                    device->backend->name, bytes);
}

ac_status
ac_device_alloc(ac_device *device, size_t bytes, void **out)
{
    ac_blocks *b = blocks_of(device);
    void *handle;
    ac_stream stream = {.given = true};
    *out = NULL;
    if (!b) {
        return device->backend->alloc(device->self, bytes, out);
    }
    if (b->from.alloc(b->from.self, device->index, bytes, out, &handle, &stream.handle) < 0) {
        return refused(device, bytes);
    }
    ac_status status = device->backend->wait(device->self, stream);
    if (status == AC_OK) {
        status = remember(b, *out, handle);
    }
    if (status < 0) {
        b->from.free(handle);
        *out = NULL;
    }
    return status;
}

void
ac_device_free(ac_device *device, void *memory)
{
    ac_blocks *b = blocks_of(device);
    void *handle = b ? forget(b, memory) : NULL;
    if (!handle) {
        device->backend->free(device->self, memory);
        return;
    }
    if (device->backend->wait(device->self, (ac_stream){0}) < 0) {
        ac_log(1, "%s:%d: memory stays taken: %s", device->backend->name, (int)device->index,
               ac_error_message());
        return; /* somebody may use it still; of a lost device nobody will */
    }
    b->from.free(handle);
}
