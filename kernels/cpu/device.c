/* device: the CPU as a backend.  engine -> [device] -> pool, kernels.
 *
 * Device memory is host memory, so weights and inputs are used where they lie; kernels compute in
 * f32.  ACCEL_CPU=base|avx2|avx512 forces an instruction set.
 */
#include "../../csrc/device.h"
#include "list.h"
#include "pool_lane.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static const char *const isa_names[] = {"base", "avx2", "avx512"};

static int32_t
best_isa(void)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
        return AC_ISA_AVX512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
        return AC_ISA_AVX2;
    }
#endif
    return AC_ISA_BASE;
}

static ac_status
choose_isa(int32_t *out)
{
    int32_t best = best_isa();
    const char *forced = getenv("ACCEL_CPU");
    *out = best;
    if (!forced || !*forced) {
        return AC_OK;
    }
    for (int32_t i = 0; i < (int32_t)AC_ARRAY_LEN(isa_names); i++) {
        if (strcmp(forced, isa_names[i]) == 0) {
            *out = i;
            return i <= best ? AC_OK
                             : ac_error(AC_E_UNSUPPORTED,
                                        "ACCEL_CPU: found \"%s\", expected at most \"%s\", which "
                                        "is what this CPU has",
                                        forced, isa_names[best]);
        }
    }
    return ac_error(AC_E_INVALID, "ACCEL_CPU: found \"%s\", expected base, avx2 or avx512", forced);
}

/* Nothing lives per open: the pool is the process's.  Any non-null pointer will do. */
static ac_status
cpu_open(int32_t index, void **self, ac_caps *caps)
{
    if (index != 0) {
        return ac_error(AC_E_DEVICE, "cpu:%d: found device number %d, expected 0", index, index);
    }
    AC_TRY(choose_isa(&caps->isa));
    if (getenv("ACCEL_THREADS")) {
        AC_TRY(ac_pool_set_threads(0));
    }
    caps->workers = ac_pool_threads();
    *self = (void *)&ac_backend_cpu;
    return AC_OK;
}

static void
cpu_close(void *self)
{
    (void)self;
}

/* Bytes the system can still give without swapping; SIZE_MAX when it does not say. */
static size_t
free_bytes(void)
{
    unsigned long long kilobytes = 0, value;
    bool found = false;
    char line[128];
    FILE *file = fopen("/proc/meminfo", "r");
    while (file && fgets(line, sizeof line, file)) {
        if (sscanf(line, "MemAvailable: %llu", &value) == 1 ||
            sscanf(line, "SwapFree: %llu", &value) == 1) {
            kilobytes += value;
            found = true;
        }
    }
    if (file) {
        fclose(file);
    }
    return found ? (size_t)kilobytes * 1024 : SIZE_MAX;
}

#define HUGE_PAGE ((size_t)2 << 20)

/* The heap pointer lies just before the memory.  Large blocks start at a huge page: a GEMM that
 * walks an arena of 4 KB pages spends a tenth of its time on address translation. */
static ac_status
cpu_alloc(void *self, size_t bytes, void **out)
{
    (void)self;
    size_t alignment = bytes >= 2 * HUGE_PAGE ? HUGE_PAGE : 256, total = 0;
    bool sizable = ac_add_size(bytes, alignment + sizeof(void *), &total);
    size_t available = bytes >= 64 * HUGE_PAGE ? free_bytes() : SIZE_MAX;
    char *raw = sizable && total <= available ? ac_malloc(total) : NULL;
    if (!raw) {
        return ac_error(AC_E_MEMORY, "cpu: out of memory: %zu bytes wanted, %zu free", bytes,
                        free_bytes());
    }
    char *memory = (char *)ac_align_up((size_t)(raw + sizeof(void *)), alignment);
    memcpy(memory - sizeof(void *), &raw, sizeof raw);
    if (alignment == HUGE_PAGE) {
        madvise(memory, bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
    }
    *out = memory;
    return AC_OK;
}

static void
cpu_free(void *self, void *memory)
{
    (void)self;
    if (memory) {
        void *raw;
        memcpy(&raw, (char *)memory - sizeof(void *), sizeof raw);
        ac_free(raw);
    }
}

static ac_status
cpu_lane_open(void *self, ac_lane **out)
{
    (void)self;
    return ac_pool_lane_open(out);
}

static void
cpu_lane_close(void *self, ac_lane *lane)
{
    (void)self;
    ac_pool_lane_close(lane);
}

static ac_status
cpu_lane_reserve(void *self, ac_lane *lane, size_t worker_scratch)
{
    (void)self;
    return ac_pool_lane_reserve(lane, worker_scratch);
}

static ac_status
cpu_copy(void *self, ac_lane *lane, void *to, const void *from, size_t bytes)
{
    (void)self;
    (void)lane;
    if (bytes && to != from) {
        memmove(to, from, bytes);
    }
    return AC_OK;
}

static ac_status
cpu_sync(void *self, ac_lane *lane)
{
    (void)self;
    (void)lane;
    return AC_OK;
}

const ac_backend ac_backend_cpu = {
    .abi = AC_ABI,
    .name = "cpu",
    .kernels = ac_cpu_kernels,
    .open = cpu_open,
    .close = cpu_close,
    .alloc = cpu_alloc,
    .free = cpu_free,
    .lane_open = cpu_lane_open,
    .lane_close = cpu_lane_close,
    .lane_reserve = cpu_lane_reserve,
    .upload = cpu_copy,
    .download = cpu_copy,
    .copy = cpu_copy,
    .sync = cpu_sync,
    .sampler = ac_cpu_sampler,
    .host_memory = true,
};
