/* pool: the CPU backend's threads.  One pool a process; made again after fork.
 *
 * A launch is cut into tiles; which thread takes which tile never changes what is computed, so
 * results do not depend on the number of threads.  Several lanes may run at once: workers take
 * tiles from them in turn.
 */
#ifndef AC_CPU_POOL_H
#define AC_CPU_POOL_H

#include "../../csrc/kernel.h"

/* Calls fn(arg, tile, scratch) once for each tile in [0, tiles); returns when all are done.
 * `scratch` is the running thread's own, as large as the plan's largest worker_scratch. */
typedef void (*ac_tile_fn)(void *arg, int64_t tile, void *scratch);
void ac_pool_run(ac_lane *lane, int64_t tiles, ac_tile_fn fn, void *arg);

/* Threads that work, the caller included.  0 asks for the default: ACCEL_THREADS or the cores this
 * process may use.  Takes effect at the next run. */
ac_status ac_pool_set_threads(int32_t threads);
int32_t ac_pool_threads(void);

#endif
