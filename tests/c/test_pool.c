/* test_pool: the CPU backend's threads: every tile once, lanes at the same time, fork, sizes. */
#include "test.h"

#include "../../csrc/device.h"
#include "../../kernels/cpu/pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/wait.h>
#include <unistd.h>

#define TILES 1000

typedef struct counted {
    _Atomic int32_t hits[TILES];
    size_t scratch; /* bytes each thread must have for itself */
    _Atomic int32_t spoiled;
} counted;

static void
count_tile(void *arg, int64_t tile, void *scratch)
{
    counted *c = arg;
    atomic_fetch_add(&c->hits[tile], 1);
    memset(scratch, (int)(tile & 127), c->scratch);
    for (int i = 0; i < 200; i++) {
        __asm__ volatile("" ::: "memory");
    }
    for (size_t i = 0; i < c->scratch; i++) {
        if (((const char *)scratch)[i] != (char)(tile & 127)) {
            atomic_fetch_add(&c->spoiled, 1);
        }
    }
}

/* Runs `rounds` launches of changing size; true when each tile ran once each time. */
static bool
rounds_are_right(ac_lane *lane, int rounds, size_t scratch)
{
    static _Thread_local counted c;
    for (int round = 0; round < rounds; round++) {
        int64_t tiles = round % 7 == 0 ? round % 3 : 1 + (round * 37) % TILES;
        memset(&c, 0, sizeof c);
        c.scratch = scratch;
        ac_pool_run(lane, tiles, count_tile, &c);
        for (int64_t i = 0; i < TILES; i++) {
            if (atomic_load(&c.hits[i]) != (i < tiles)) {
                return false;
            }
        }
        if (atomic_load(&c.spoiled)) {
            return false;
        }
    }
    return true;
}

static ac_lane *
open_lane(size_t scratch)
{
    ac_lane *lane;
    CHECK_OK(ac_backend_cpu.lane_open(NULL, &lane));
    CHECK_OK(ac_backend_cpu.lane_reserve(NULL, lane, scratch));
    return lane;
}

static void
every_tile_once_for_any_number_of_threads(void)
{
    ac_lane *lane = open_lane(64);
    for (int32_t threads = 1; threads <= 5; threads++) {
        CHECK_OK(ac_pool_set_threads(threads));
        CHECK(rounds_are_right(lane, 60, 64));
    }
    CHECK_OK(ac_pool_set_threads(2));
    CHECK(rounds_are_right(lane, 60, 64));
    ac_backend_cpu.lane_close(NULL, lane);
}

static void
threads_may_grow_after_reserve(void)
{
    CHECK_OK(ac_pool_set_threads(1));
    ac_lane *lane = open_lane(5000);
    CHECK_OK(ac_pool_set_threads(4));
    CHECK(rounds_are_right(lane, 60, 5000));
    ac_backend_cpu.lane_close(NULL, lane);
}

static void *
submit(void *out)
{
    ac_lane *lane;
    bool *right = out;
    *right = ac_backend_cpu.lane_open(NULL, &lane) == AC_OK &&
             ac_backend_cpu.lane_reserve(NULL, lane, 256) == AC_OK &&
             rounds_are_right(lane, 300, 256);
    ac_backend_cpu.lane_close(NULL, lane);
    return NULL;
}

static void
several_lanes_at_once(void)
{
    pthread_t thread[3];
    bool right[3] = {false};
    CHECK_OK(ac_pool_set_threads(3));
    for (int i = 0; i < 3; i++) {
        CHECK_INT(pthread_create(&thread[i], NULL, submit, &right[i]), 0);
    }
    for (int i = 0; i < 3; i++) {
        pthread_join(thread[i], NULL);
    }
    CHECK(right[0] && right[1] && right[2]);
}

static void
wakes_after_sleep(void)
{
    ac_lane *lane = open_lane(64);
    CHECK_OK(ac_pool_set_threads(3));
    for (int i = 0; i < 5; i++) {
        CHECK(rounds_are_right(lane, 3, 64));
        usleep(20000);
    }
    ac_backend_cpu.lane_close(NULL, lane);
}

static void
works_in_a_child_of_fork(void)
{
    ac_lane *lane = open_lane(64);
    CHECK_OK(ac_pool_set_threads(3));
    CHECK(rounds_are_right(lane, 20, 64));
    pid_t child = fork();
    if (child == 0) {
        _exit(rounds_are_right(lane, 20, 64) ? 0 : 1);
    }
    int status;
    CHECK_INT(waitpid(child, &status, 0), child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(rounds_are_right(lane, 20, 64));
    ac_backend_cpu.lane_close(NULL, lane);
}

static void
refuses_bad_sizes(void)
{
    void *self;
    ac_caps caps;
    CHECK_STATUS(ac_pool_set_threads(-1), AC_E_INVALID, "threads: found -1");
    CHECK_STATUS(ac_pool_set_threads(100000), AC_E_INVALID, "threads: found 100000");
    setenv("ACCEL_THREADS", "many", 1);
    CHECK_STATUS(ac_backend_cpu.open(0, &self, &caps), AC_E_INVALID, "ACCEL_THREADS");
    unsetenv("ACCEL_THREADS");
    setenv("ACCEL_CPU", "sparc", 1);
    CHECK_STATUS(ac_backend_cpu.open(0, &self, &caps), AC_E_INVALID, "ACCEL_CPU");
    setenv("ACCEL_CPU", "base", 1);
    CHECK_OK(ac_backend_cpu.open(0, &self, &caps));
    CHECK_INT(caps.isa, AC_ISA_BASE);
    unsetenv("ACCEL_CPU");
    CHECK_STATUS(ac_backend_cpu.open(1, &self, &caps), AC_E_DEVICE, "device number 1");
}

static void
memory_is_aligned_and_its_lack_is_told(void)
{
    void *self, *small, *large;
    ac_caps caps;
    CHECK_OK(ac_backend_cpu.open(0, &self, &caps));
    CHECK_OK(ac_backend_cpu.alloc(self, 1, &small));
    CHECK_OK(ac_backend_cpu.alloc(self, 5 << 20, &large));
    CHECK((uintptr_t)small % 256 == 0 && (uintptr_t)large % 256 == 0);
    memset(large, 1, 5 << 20);
    ac_backend_cpu.free(self, small);
    ac_backend_cpu.free(self, large);
    CHECK_STATUS(ac_backend_cpu.alloc(self, (size_t)1 << 50, &large), AC_E_MEMORY,
                 "1125899906842624 bytes wanted");
    ac_backend_cpu.close(self);
}

TEST_MAIN(TEST(every_tile_once_for_any_number_of_threads), TEST(threads_may_grow_after_reserve),
          TEST(several_lanes_at_once), TEST(wakes_after_sleep), TEST(works_in_a_child_of_fork),
          TEST(refuses_bad_sizes), TEST(memory_is_aligned_and_its_lack_is_told))
