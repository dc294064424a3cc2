/* memory: PyTorch's allocator as a device's, through the C functions that a tensor library
 * publishes for DLPack (`Tensor.__dlpack_c_exchange_api__`).  They need no GIL, so they may be
 * called under the engine's locks.  A PyTorch that publishes none leaves memory to the backend. */
#include "py.h"

#include "dlpack.h"

/* The allocator's message is not passed on: the engine says what was asked for and what is free. */
static void
ignore_error(void *context, const char *kind, const char *message)
{
    (void)context;
    (void)kind;
    (void)message;
}

static ac_status
alloc(void *self, int32_t index, size_t bytes, void **out, void **handle, void **stream)
{
    const DLPackExchangeAPI *api = self;
    int64_t count = (int64_t)AC_MAX(bytes, 1);
    DLTensor prototype = {.device = {DL_CUDA, index}, .ndim = 1, .dtype = {DL_UINT, 8, 1},
                          .shape = &count};
    DLManagedTensorVersioned *made = NULL;
    if (bytes > INT64_MAX || api->managed_tensor_allocator(&prototype, &made, NULL,
                                                           ignore_error) != 0 || !made) {
        return ac_error(AC_E_MEMORY, "out of memory: %zu bytes were asked for", bytes);
    }
    const DLTensor *t = &made->dl_tensor;
    *out = (char *)t->data + t->byte_offset;
    *handle = made;
    if (!t->data || t->device.device_type != DL_CUDA || t->device.device_id != index ||
        (uintptr_t)*out % 256 != 0 || api->current_work_stream(DL_CUDA, index, stream) != 0) {
        made->deleter(made);
        return ac_error(AC_E_INTERNAL, "memory: found other memory than was asked for");
    }
    return AC_OK;
}

static void
release(void *handle)
{
    DLManagedTensorVersioned *made = handle;
    made->deleter(made);
}

int
ac_py_memory_of(PyObject *capsule, ac_memory *out)
{
    const DLPackExchangeAPI *api = ac_py_exchange_api(capsule);
    if (PyErr_Occurred()) {
        return -1;
    }
    if (!api || !api->managed_tensor_allocator || !api->current_work_stream) {
        return 0;
    }
    *out = (ac_memory){.alloc = alloc, .free = release, .self = (void *)api};
    return 1;
}
