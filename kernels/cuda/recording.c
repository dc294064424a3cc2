/* recording: points in time, and launches recorded as a CUDA graph.
 *
 *     device.c's table -> [recording]
 *
 * A recording is made in the lane's own stream, in thread-local mode: the caller's may be the
 * legacy stream, which records nothing, and other threads go on as they are. */
#include "recording.h"

#include "context.h"

#include <string.h>
#include <time.h>

struct ac_recording {
    cudaGraphExec_t graph;
};

/* ---- points in time -------------------------------------------------------------------------- */

static ac_status
grow_times(ac_lane *lane, int32_t count)
{
    int32_t capacity = (count + 1023) / 1024 * 1024;
    cudaEvent_t *more = ac_cuda_host->alloc(sizeof *more * (size_t)capacity);
    if (!more) {
        return ac_cuda_fail(AC_E_MEMORY, "out of memory: %zu bytes were asked for",
                            sizeof *more * (size_t)capacity);
    }
    memset(more, 0, sizeof *more * (size_t)capacity);
    if (lane->n_times) {
        memcpy(more, lane->times, sizeof *more * (size_t)lane->n_times);
    }
    ac_cuda_host->free(lane->times);
    lane->times = more;
    for (; lane->n_times < capacity; lane->n_times++) {
        AC_TRY(ac_cuda_check(cudaEventCreate(&more[lane->n_times]), "cudaEventCreate"));
    }
    return AC_OK;
}

ac_status
ac_cuda_time_mark(void *self, ac_lane *lane, int32_t index)
{
    int previous;
    AC_TRY(ac_cuda_device_enter(self, &previous));
    ac_status status = AC_OK;
    if (index >= lane->n_times) {
        status = grow_times(lane, index + 1);
    }
    if (status == AC_OK) { /* external: a node of the graph that the host can ask about */
        unsigned flags = lane->recording ? cudaEventRecordExternal : cudaEventRecordDefault;
        status = ac_cuda_check(cudaEventRecordWithFlags(lane->times[index], lane->stream, flags),
                               "cudaEventRecordWithFlags");
    }
    return ac_cuda_device_leave(self, previous, status);
}

ac_status
ac_cuda_time_read(void *self, ac_lane *lane, int32_t count, double *ms)
{
    int previous;
    AC_TRY(ac_cuda_device_enter(self, &previous));
    ac_status status = ac_cuda_check(cudaStreamSynchronize(lane->stream), "cudaStreamSynchronize");
    for (int32_t i = 0; i + 1 < count && status == AC_OK; i++) {
        float time = 0.0f;
        status = ac_cuda_check(cudaEventElapsedTime(&time, lane->times[i], lane->times[i + 1]),
                               "cudaEventElapsedTime");
        ms[i] = (double)time;
    }
    return ac_cuda_device_leave(self, previous, status);
}

/* ---- recordings, and waits for the device ---------------------------------------------------- */

enum { PATIENCE = 200 }; /* milliseconds; a recording takes a few */

static int32_t recorded; /* streams, by all threads; atomic */
static __thread int32_t recorded_here;

void
ac_cuda_set_recording(ac_lane *lane, bool now)
{
    int32_t change = now - lane->recording;
    lane->recording = now;
    recorded_here += change;
    __atomic_add_fetch(&recorded, change, __ATOMIC_ACQ_REL);
}

cudaError_t
ac_cuda_wait_for_device(void)
{
    static const struct timespec one = {.tv_nsec = 1000000};
    for (int ms = 0; ms < PATIENCE && recorded_here == 0; ms++) {
        if (__atomic_load_n(&recorded, __ATOMIC_ACQUIRE) == 0) {
            cudaError_t status = cudaDeviceSynchronize();
            if (!ac_cuda_is_of_recording(status)) {
                return status;
            }
            cudaGetLastError(); /* not the next launch's */
        }
        nanosleep(&one, NULL);
    }
    return cudaDeviceSynchronize();
}

/* ---- recording ------------------------------------------------------------------------------- */

ac_status
ac_cuda_record_begin(void *self, ac_lane *lane)
{
    int previous;
    AC_TRY(ac_cuda_device_enter(self, &previous));
    cudaError_t status = cudaStreamBeginCapture(lane->own, cudaStreamCaptureModeThreadLocal);
    if (status == cudaSuccess) { /* the caller's may be the legacy stream, which records nothing */
        ac_cuda_set_recording(lane, true);
        lane->outside = lane->stream;
        lane->stream = lane->own;
    }
    return ac_cuda_device_leave(self, previous, ac_cuda_check(status, "cudaStreamBeginCapture"));
}

static ac_status
instantiate(ac_lane *lane, ac_recording *recording)
{
    cudaGraph_t graph = NULL;
    ac_status status = ac_cuda_check(cudaStreamEndCapture(lane->stream, &graph),
                                     "cudaStreamEndCapture");
    if (status == AC_OK) {
        status = ac_cuda_check(cudaGraphInstantiate(&recording->graph, graph, 0),
                               "cudaGraphInstantiate");
    }
    if (graph) {
        cudaGraphDestroy(graph);
    }
    lane->stream = lane->outside;
    if (status == AC_OK) {
        status = ac_cuda_check(cudaGraphUpload(recording->graph, lane->stream), "cudaGraphUpload");
    }
    return status;
}

ac_status
ac_cuda_record_end(void *self, ac_lane *lane, ac_recording **out)
{
    int previous;
    ac_recording *recording = ac_cuda_host->alloc(sizeof *recording);
    *out = NULL;
    if (recording) {
        *recording = (ac_recording){0};
    }
    ac_status status = ac_cuda_device_enter(self, &previous);
    if (status == AC_OK) {
        ac_recording unused = {0};
        status = instantiate(lane, recording ? recording : &unused);
        status = ac_cuda_device_leave(self, previous, status);
        if (unused.graph) {
            cudaGraphExecDestroy(unused.graph);
        }
    }
    ac_cuda_set_recording(lane, false);
    lane->stream = lane->outside;
    if (!recording) {
        return ac_cuda_fail(AC_E_MEMORY, "out of memory: %zu bytes were asked for",
                            sizeof *recording);
    }
    if (status < 0) {
        if (recording->graph) {
            cudaGraphExecDestroy(recording->graph);
        }
        ac_cuda_host->free(recording);
        return status;
    }
    *out = recording;
    return AC_OK;
}

ac_status
ac_cuda_replay(void *self, ac_lane *lane, ac_recording *recording)
{
    int previous;
    AC_TRY(ac_cuda_device_enter(self, &previous));
    cudaError_t status = cudaGraphLaunch(recording->graph, lane->stream);
    return ac_cuda_device_leave(self, previous, ac_cuda_launched(lane, status, "cudaGraphLaunch"));
}

void
ac_cuda_record_free(void *self, ac_recording *recording)
{
    int previous;
    if (recording && ac_cuda_device_begin(self, &previous)) {
        cudaGraphExecDestroy(recording->graph);
        ac_cuda_device_end(self, previous);
    }
    ac_cuda_host->free(recording);
}
