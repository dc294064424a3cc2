/* One small graph through the same plan and exec on two backends: the CPU and, where there is a
 * GPU, libaccel_cuda.so.  Without one the error must say in a sentence what is missing. */
#include "../../csrc/backend_cuda.h"
#include "../../csrc/exec.h"
#include "test.h"

enum { ROWS = 3, COLUMNS = 700, COUNT = 2 * ROWS * COLUMNS };

/* y = silu(x + b) * 0.5 + 0.25 + x, with b [2, COLUMNS] a weight. */
static ac_graph *
little_graph(void)
{
    ac_graph *g;
    CHECK_OK(ac_graph_new(AC_F32, &g));
    ac_val x = ac_input(g, "x", AC_F32, AC_SHAPE(2, ROWS, COLUMNS), AC_RATE_STEP);
    ac_val b = ac_weight(g, "b", AC_SHAPE(2, COLUMNS));
    ac_val y = ac_add(g, x, b);
    y = ac_activation(g, y, AC_ACT_SILU);
    y = ac_scale(g, y, 0.5f, 0.25f);
    ac_output(g, ac_add(g, y, x), "y");
    CHECK_OK(ac_graph_status(g));
    return g;
}

static void
fill(float *x, int count)
{
    for (int i = 0; i < count; i++) {
        x[i] = sinf((float)i * 0.37f) * 3.0f;
    }
}

static void
expected(const float *x, const float *b, float *y)
{
    for (int i = 0; i < COUNT; i++) {
        double v = (double)x[i] + b[i / (ROWS * COLUMNS) * COLUMNS + i % COLUMNS];
        y[i] = (float)(v / (1.0 + exp(-v)) * 0.5 + 0.25 + x[i]);
    }
}

static void
run_on(ac_device *device)
{
    static float x[COUNT], y[COUNT], b[2 * COLUMNS], want[COUNT];
    const ac_backend *backend = device->backend;
    fill(x, COUNT);
    fill(b, 2 * COLUMNS);
    expected(x, b, want);
    ac_weights *weights;
    CHECK_OK(ac_weights_new(&weights));
    ac_tensor bias = ac_tensor_of(b, AC_F32, AC_SHAPE(2, COLUMNS));
    CHECK_OK(ac_weights_set(weights, "b", &bias, NULL, NULL));
    ac_weights_set_release(weights, backend->free, device->self);

    ac_plan *plan;
    ac_exec *exec;
    CHECK_OK(ac_plan_new(little_graph(), device, &plan));
    CHECK_OK(ac_exec_new(plan, weights, &exec));
    void *x_device, *y_device;
    ac_device_lane *lane;
    CHECK_OK(backend->alloc(device->self, sizeof x, &x_device));
    CHECK_OK(backend->alloc(device->self, sizeof y, &y_device));
    CHECK_OK(ac_device_lane_take(device, NULL, &lane));
    CHECK_OK(backend->upload(device->self, lane->lane, x_device, x, sizeof x));
    CHECK_OK(backend->sync(device->self, lane->lane));
    ac_device_lane_give(device, lane);
    ac_tensor in = ac_tensor_of(x_device, AC_F32, AC_SHAPE(2, ROWS, COLUMNS));
    ac_tensor out = ac_tensor_of(y_device, AC_F32, AC_SHAPE(2, ROWS, COLUMNS));
    CHECK_OK(ac_exec_bind(exec, "x", &in));
    CHECK_OK(ac_exec_bind_output(exec, "y", &out));
    for (int round = 0; round < 3; round++) {
        CHECK_OK(ac_exec_run(exec, AC_RATE_STEP));
    }
    CHECK_OK(ac_device_lane_take(device, lane, &lane));
    CHECK_OK(backend->download(device->self, lane->lane, y, y_device, sizeof y));
    CHECK_OK(backend->sync(device->self, lane->lane));
    ac_device_lane_give(device, lane);
    for (int i = 0; i < COUNT; i++) {
        CHECK_CLOSE(y[i], want[i], 2e-6);
    }
    backend->free(device->self, x_device);
    backend->free(device->self, y_device);
    ac_exec_free(exec);
    ac_plan_free(plan);
    ac_weights_unref(weights);
}

static void
the_cpu_runs_the_graph(void)
{
    ac_device *device;
    CHECK_OK(ac_device_open("cpu", &device));
    run_on(device);
    ac_device_unref(device);
}

static void
cuda_runs_the_same_or_says_why_not(void)
{
    ac_device *device;
    ac_backend_cuda_set_folder("python/accel");
    ac_status status = ac_device_open("cuda", &device);
    if (status < 0) {
        CHECK_INT(status, AC_E_DEVICE);
        CHECK(strstr(ac_error_message(), "cuda") != NULL);
        printf("(no GPU: %s) ", ac_error_message());
        return;
    }
    run_on(device);
    printf("(ran on cuda, sm_%d) ", device->caps.isa);
    ac_device_unref(device);
}

static void
wrong_names_are_refused(void)
{
    ac_device *device;
    CHECK_STATUS(ac_device_open("tpu", &device), AC_E_INVALID, "tpu");
    CHECK_STATUS(ac_device_open("cuda:x", &device), AC_E_INVALID, "cuda:x");
}

TEST_MAIN(TEST(the_cpu_runs_the_graph), TEST(cuda_runs_the_same_or_says_why_not),
          TEST(wrong_names_are_refused))
