/* bench_kernels: one kernel launch on the caller's memory, for benchmarks/bench_kernels.py.
 *
 * Built as a shared library by that script.  It picks the kernel as the plan does, the first that
 * supports the problem, and times the launch alone.
 */
#include "../csrc/device.h"
#include "../kernels/cpu/pool.h"

#include <string.h>
#include <time.h>

/* Operands come as 6 numbers each: rank (-1: absent), then up to 5 dimensions; all f32 and
 * contiguous.  Attributes come as the bytes of ac_attr.  Returns seconds, below 0 on an error. */
double
bench_kernel(int32_t op, const void *attr, int32_t attr_bytes, int32_t n_inputs,
             const int64_t *dims, void *const *data, const int64_t *out_dims, void *out,
             int32_t threads, int32_t isa)
{
    ac_tensor input[8];
    ac_problem p = {.op = (ac_op)op, .n_inputs = n_inputs, .input = input};
    memcpy(&p.attr, attr, (size_t)attr_bytes);
    for (int32_t i = 0; i <= n_inputs; i++) {
        const int64_t *d = i < n_inputs ? dims + 6 * i : out_dims;
        ac_shape shape = {.rank = (int32_t)d[0]};
        memcpy(shape.dim, d + 1, sizeof(int64_t) * 5);
        *(i < n_inputs ? &input[i] : &p.output) =
            ac_tensor_of(i < n_inputs ? data[i] : out, AC_F32, shape);
    }
    ac_caps caps = {.isa = isa, .workers = threads};
    const ac_kernel *const *k = ac_backend_cpu.kernels;
    while (*k && ((*k)->op != p.op || !(*k)->supports(&p, &caps))) {
        k++;
    }
    ac_lane *lane;
    if (!*k || ac_pool_set_threads(threads) < 0 || ac_backend_cpu.lane_open(NULL, &lane) < 0) {
        return -1.0;
    }
    size_t worker = (*k)->worker_scratch ? (*k)->worker_scratch(&p, &caps) : 0;
    size_t shared = (*k)->scratch ? (*k)->scratch(&p, &caps) : 0;
    void *scratch = NULL;
    double result = -1.0;
    if (ac_backend_cpu.lane_reserve(NULL, lane, worker) >= 0 &&
        ac_backend_cpu.alloc(NULL, shared, &scratch) >= 0) {
        struct timespec start, end;
        memset(scratch, 0, shared);
        clock_gettime(CLOCK_MONOTONIC, &start);
        ac_status status = (*k)->launch(lane, &p, scratch, NULL);
        clock_gettime(CLOCK_MONOTONIC, &end);
        result = status < 0 ? -1.0
                            : (double)(end.tv_sec - start.tv_sec) +
                                  1e-9 * (double)(end.tv_nsec - start.tv_nsec);
    }
    ac_backend_cpu.free(NULL, scratch);
    ac_backend_cpu.lane_close(NULL, lane);
    return result;
}
