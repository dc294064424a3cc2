/* pool: see pool.h.  device -> [pool] -> kernels.
 *
 * Lanes sit in a fixed table, so a worker may look at any of them at any time.  A worker enters a
 * lane (`inside`), looks whether a job is open there, takes one tile, leaves, and goes on with the
 * next lane: that is the fairness.  A submitter opens its job, works on it too, closes it, and
 * waits until nobody is inside; the pair (inside, open) is sequentially consistent, so after that
 * wait no worker can still read the job.
 *
 * Steps are short (about 1000 launches in a UNet call), so idle workers spin for some tens of
 * microseconds before they sleep.  The pool is process state: a child of fork starts without
 * threads and makes its own at its first run.
 */
#include "pool_lane.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>

#define MAX_LANES 256
#define MAX_THREADS 256
#define SPINS 1500 /* about 20 to 40 us of pause instructions */

struct ac_lane {
    _Alignas(128) _Atomic int64_t next; /* tile to take */
    _Alignas(128) _Atomic int32_t open; /* a job may be entered */
    _Atomic int32_t inside;             /* workers that may read the job */
    _Atomic int32_t waiting;            /* the submitter sleeps on `left` */
    _Atomic int64_t tiles;
    _Atomic int32_t slots; /* threads that have scratch here */
    ac_tile_fn fn;
    void *arg;
    char *scratch; /* `slots` pieces of `slot_bytes`; the submitter's is the first */
    size_t slot_bytes;
    bool used;
};

typedef struct pool_state {
    pthread_mutex_t lock;
    pthread_cond_t work; /* workers sleep here */
    pthread_cond_t left; /* submitters wait here for the last worker */
    _Atomic int32_t sleepers;
    _Atomic int32_t wanted;  /* threads, the caller included; 0: not decided yet */
    _Atomic int32_t started; /* workers that exist; worker i has slot i, 1 .. started */
    _Atomic int32_t n_lanes; /* entries of `lane` ever used */
    struct ac_lane lane[MAX_LANES];
} pool_state;

static pool_state pool = {
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .work = PTHREAD_COND_INITIALIZER,
    .left = PTHREAD_COND_INITIALIZER,
};

static void
relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* ---- workers -------------------------------------------------------------------------------- */

static void
leave(struct ac_lane *lane)
{
    if (atomic_fetch_sub(&lane->inside, 1) == 1 && atomic_load(&lane->waiting)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.left);
        pthread_mutex_unlock(&pool.lock);
    }
}

/* Runs one tile of the lane; false when it has none. */
static bool
help(struct ac_lane *lane, int32_t slot)
{
    if (!atomic_load_explicit(&lane->open, memory_order_relaxed)) {
        return false;
    }
    bool worked = false;
    atomic_fetch_add(&lane->inside, 1);
    if (atomic_load(&lane->open) && slot < lane->slots) {
        int64_t tile = atomic_fetch_add(&lane->next, 1);
        if (tile < lane->tiles) {
            lane->fn(lane->arg, tile, lane->scratch + (size_t)slot * lane->slot_bytes);
            worked = true;
        }
    }
    leave(lane);
    return worked;
}

static bool
may_work(int32_t slot)
{
    if (slot >= atomic_load(&pool.wanted)) {
        return false;
    }
    int32_t count = atomic_load(&pool.n_lanes);
    for (int32_t i = 0; i < count; i++) {
        struct ac_lane *lane = &pool.lane[i];
        if (atomic_load(&lane->open) && slot < lane->slots &&
            atomic_load_explicit(&lane->next, memory_order_relaxed) < lane->tiles) {
            return true;
        }
    }
    return false;
}

static void
sleep_until_work(int32_t slot)
{
    pthread_mutex_lock(&pool.lock);
    atomic_fetch_add(&pool.sleepers, 1);
    while (!may_work(slot)) {
        pthread_cond_wait(&pool.work, &pool.lock);
    }
    atomic_fetch_sub(&pool.sleepers, 1);
    pthread_mutex_unlock(&pool.lock);
}

static void *
worker(void *arg)
{
    int32_t slot = (int32_t)(intptr_t)arg, idle = 0;
    for (int32_t at = 0;;) {
        int32_t count = atomic_load(&pool.n_lanes);
        bool worked = false;
        if (slot < atomic_load(&pool.wanted)) {
            for (int32_t i = 0; i < count && !worked; i++) {
                at = at + 1 < count ? at + 1 : 0;
                worked = help(&pool.lane[at], slot);
            }
        }
        if (worked) {
            idle = 0;
        } else if (++idle < SPINS) {
            relax();
        } else {
            sleep_until_work(slot);
            idle = 0;
        }
    }
    return NULL;
}

/* ---- starting ------------------------------------------------------------------------------- */

/* The child of fork has one thread and locks in any state: begin anew, keep the lanes' scratch. */
static void
in_child(void)
{
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.work, NULL);
    pthread_cond_init(&pool.left, NULL);
    atomic_store(&pool.sleepers, 0);
    atomic_store(&pool.started, 0);
    for (int32_t i = 0; i < MAX_LANES; i++) {
        atomic_store(&pool.lane[i].open, 0);
        atomic_store(&pool.lane[i].inside, 0);
        atomic_store(&pool.lane[i].waiting, 0);
    }
}

static void
register_fork(void)
{
    pthread_atfork(NULL, NULL, in_child);
}

static ac_status
default_threads(int32_t *out)
{
    const char *text = getenv("ACCEL_THREADS");
    if (text && *text) {
        char *end;
        errno = 0;
        long value = strtol(text, &end, 10);
        if (errno || *end || value < 1 || value > MAX_THREADS) {
            return ac_error(AC_E_INVALID, "ACCEL_THREADS: found \"%s\", expected 1 to %d", text,
                            MAX_THREADS);
        }
        *out = (int32_t)value;
        return AC_OK;
    }
    cpu_set_t set;
    int32_t cores = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    *out = AC_MIN(AC_MAX(cores, 1), MAX_THREADS);
    return AC_OK;
}

ac_status
ac_pool_set_threads(int32_t threads)
{
    if (threads < 0 || threads > MAX_THREADS) {
        return ac_error(AC_E_INVALID, "threads: found %d, expected 0 to %d", threads, MAX_THREADS);
    }
    if (threads == 0) {
        AC_TRY(default_threads(&threads));
    }
    atomic_store(&pool.wanted, threads);
    return AC_OK;
}

int32_t
ac_pool_threads(void)
{
    int32_t threads = atomic_load(&pool.wanted);
    if (!threads && default_threads(&threads) < 0) {
        threads = 1; /* opening the device has said, or will say, what is wrong */
    }
    return threads;
}

/* Starts the workers that are missing.  Too few threads is slow, not wrong, so failure is quiet. */
static void
start_workers(int32_t threads)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, register_fork);
    pthread_mutex_lock(&pool.lock);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals belong to the program's threads */
    while (atomic_load(&pool.started) < threads - 1) {
        pthread_t thread;
        int32_t slot = atomic_load(&pool.started) + 1;
        if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)slot) != 0) {
            break;
        }
        pthread_detach(thread);
        atomic_store(&pool.started, slot);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_mutex_unlock(&pool.lock);
}

/* ---- lanes ---------------------------------------------------------------------------------- */

ac_status
ac_pool_lane_open(ac_lane **out)
{
    if (!atomic_load(&pool.wanted)) {
        AC_TRY(ac_pool_set_threads(0));
    }
    ac_lane *lane = NULL;
    pthread_mutex_lock(&pool.lock);
    for (int32_t i = 0; i < MAX_LANES && !lane; i++) {
        if (!pool.lane[i].used) {
            lane = &pool.lane[i];
            lane->used = true;
            atomic_store(&pool.n_lanes, AC_MAX(atomic_load(&pool.n_lanes), i + 1));
        }
    }
    pthread_mutex_unlock(&pool.lock);
    if (!lane) {
        return ac_error(AC_E_DEVICE, "cpu: found %d open lanes, expected fewer", MAX_LANES);
    }
    lane->scratch = NULL;
    lane->slot_bytes = 0;
    lane->slots = MAX_THREADS; /* no scratch: any thread may help */
    *out = lane;
    return AC_OK;
}

void
ac_pool_lane_close(ac_lane *lane)
{
    if (lane) {
        ac_free_aligned(lane->scratch);
        lane->scratch = NULL;
        pthread_mutex_lock(&pool.lock);
        lane->used = false;
        pthread_mutex_unlock(&pool.lock);
    }
}

ac_status
ac_pool_lane_reserve(ac_lane *lane, size_t worker_scratch)
{
    size_t bytes = ac_align_up(AC_MAX(worker_scratch, lane->slot_bytes), 4096), total;
    int32_t slots = AC_MAX(ac_pool_threads(), 1);
    if (!bytes || (bytes == lane->slot_bytes && slots <= lane->slots)) {
        return AC_OK;
    }
    if (!ac_mul_size(bytes, (size_t)slots, &total)) {
        return ac_no_memory(SIZE_MAX);
    }
    char *scratch = ac_malloc_aligned(total);
    if (!scratch) {
        return ac_no_memory(total);
    }
    ac_free_aligned(lane->scratch);
    lane->scratch = scratch;
    lane->slot_bytes = bytes;
    lane->slots = slots;
    return AC_OK;
}

/* ---- running -------------------------------------------------------------------------------- */

static void
wake(int64_t count)
{
    int32_t sleepers = atomic_load(&pool.sleepers);
    if (!sleepers) {
        return;
    }
    pthread_mutex_lock(&pool.lock);
    if (count < sleepers && atomic_load(&pool.started) < atomic_load(&pool.wanted)) {
        for (int64_t i = 0; i < count; i++) {
            pthread_cond_signal(&pool.work);
        }
    } else { /* threads beyond `wanted` sleep too, and a signal might reach only them */
        pthread_cond_broadcast(&pool.work);
    }
    pthread_mutex_unlock(&pool.lock);
}

static void
wait_for_the_last(ac_lane *lane)
{
    for (int i = 0; i < SPINS; i++) {
        if (!atomic_load(&lane->inside)) {
            return;
        }
        relax();
    }
    pthread_mutex_lock(&pool.lock);
    atomic_store(&lane->waiting, 1);
    while (atomic_load(&lane->inside)) {
        pthread_cond_wait(&pool.left, &pool.lock);
    }
    atomic_store(&lane->waiting, 0);
    pthread_mutex_unlock(&pool.lock);
}

void
ac_pool_run(ac_lane *lane, int64_t tiles, ac_tile_fn fn, void *arg)
{
    int32_t threads = ac_pool_threads();
    if (threads > lane->slots) { /* more threads since the last reserve: rare, may fail, harmless */
        (void)ac_pool_lane_reserve(lane, lane->slot_bytes);
    }
    if (threads == 1 || tiles <= 1) {
        for (int64_t tile = 0; tile < tiles; tile++) {
            fn(arg, tile, lane->scratch);
        }
        return;
    }
    if (atomic_load(&pool.started) < threads - 1) {
        start_workers(threads);
    }
    lane->fn = fn;
    lane->arg = arg;
    lane->tiles = tiles;
    atomic_store(&lane->next, 0);
    atomic_store(&lane->open, 1);
    wake(tiles - 1);
    for (int64_t tile; (tile = atomic_fetch_add(&lane->next, 1)) < tiles;) {
        fn(arg, tile, lane->scratch);
    }
    atomic_store(&lane->open, 0);
    wait_for_the_last(lane);
}
