/* recording: entries of the backend's table; csrc/device.h says what each does. */
#ifndef AC_CUDA_RECORDING_H
#define AC_CUDA_RECORDING_H

#include "cuda.h"

/* The lane's stream is recorded by this thread from now on, or has been. */
void ac_cuda_set_recording(ac_lane *lane, bool now);
/* cudaDeviceSynchronize, which fails while a stream of the device is recorded, by whomever and in
 * whatever mode, and spoils that recording: waits for ours to end first, and tries again after
 * another's, for a fifth of a second at most. */
cudaError_t ac_cuda_wait_for_device(void);

ac_status ac_cuda_time_mark(void *self, ac_lane *lane, int32_t index);
ac_status ac_cuda_time_read(void *self, ac_lane *lane, int32_t count, double *ms);

ac_status ac_cuda_record_begin(void *self, ac_lane *lane);
/* After a failed step too: the stream leaves capture mode, and *out stays NULL. */
ac_status ac_cuda_record_end(void *self, ac_lane *lane, ac_recording **out);
ac_status ac_cuda_replay(void *self, ac_lane *lane, ac_recording *recording);
void ac_cuda_record_free(void *self, ac_recording *recording);

#endif
