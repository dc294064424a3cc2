/* pool_lane: what device.c needs of the pool: opening, closing and sizing lanes.
 *
 * A lane has one submitter at a time (the engine holds the lane's lock), so its scratch may grow
 * between runs without asking the other lanes.
 */
#ifndef AC_CPU_POOL_LANE_H
#define AC_CPU_POOL_LANE_H

#include "pool.h"

/* INVALID for a bad ACCEL_THREADS, DEVICE when too many lanes are open. */
ac_status ac_pool_lane_open(ac_lane **out);
void ac_pool_lane_close(ac_lane *lane);
/* Every thread that may work for the lane has this much scratch from the next run on. */
ac_status ac_pool_lane_reserve(ac_lane *lane, size_t worker_scratch);

#endif
