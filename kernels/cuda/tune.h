/* tune: which of several ways to do a problem is the fastest, measured once and remembered.
 *
 *     first use of a problem -> known? take it : measure all -> memory -> file
 *
 * A key names problem, library and its version; the device's name is added here.  A way is named
 * so that the name means the same in the next process.  Of a problem with many ways, whose family
 * (library, op, dtype: a key's first four words) has a dozen choices already, only the first ways
 * and those that were chosen before are measured: half of the time, and 0.4 % slower than the best
 * of all on the H200.
 *
 * The file is text, one line a problem: ACCEL_CACHE/cuda-1.txt, ACCEL_CACHE by default
 * ~/.cache/accel.  ACCEL_TUNE=off measures nothing, reads no file and takes way 0 of every problem;
 * ACCEL_TUNE=full measures every way of every problem.  Nothing is measured while a stream is
 * captured.
 *
 * All calls are made between ac_cuda_libraries_enter and _leave.
 */
#ifndef AC_CUDA_TUNE_H
#define AC_CUDA_TUNE_H

#include "library.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { AC_TUNE_KEY = 320, AC_TUNE_WAY = 64 }; /* longest texts, with their ends */

typedef struct ac_tune_ways {
    const char *key;
    int32_t count;
    void *context;
    /* Way `i`'s name; a file in which it stands makes this way the choice. */
    void (*name)(const void *context, int32_t i, char name[AC_TUNE_WAY]);
    /* Does the whole problem that way, again and again with the same result.  A way that fails is
     * not chosen. */
    ac_status (*run)(void *context, int32_t i);
} ac_tune_ways;

/* *best is 0 where nothing may be measured, and after a failure what it was.  The caller remembers
 * it: a problem that has run once is done the same way as long as the device is open. */
ac_status ac_tune_choose(ac_lane *lane, ac_cuda_libraries *libraries, const ac_tune_ways *ways,
                         int32_t *best);

/* FNV-1a of some bytes, after those that gave `hash`; AC_TUNE_HASH at first.  For names. */
#define AC_TUNE_HASH UINT64_C(0xcbf29ce484222325)
uint64_t ac_tune_hash(uint64_t hash, const void *bytes, size_t count);

/* Where files are kept that later processes may use, and the device's name; NULL: nowhere. */
const char *ac_tune_folder(ac_cuda_libraries *libraries, const char **device);

#ifdef __cplusplus
}
#endif

#endif
