/* test: the harness that all C tests share.  One program a file:
 *
 *     static void adds(void) { CHECK_INT(1 + 1, 2); }
 *     TEST_MAIN(TEST(adds))
 *
 * `program [--oom] [--list] [part of a name]` prints each test's name, exits 1 on a failure.
 * A failed check leaves its test by longjmp, so checks belong on the main thread, and what a
 * failing test leaves behind is not cleaned.  A test that passes must free all it allocated.
 */
#ifndef AC_TEST_H
#define AC_TEST_H

#include "../../csrc/base.h"
#include "../../csrc/tensor.h"

#include <inttypes.h>
#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct test_row {
    const char *name;
    void (*run)(void);
} test_row;

/* The one test program's state; tentative definition, one translation unit a program. */
static struct {
    jmp_buf failed;
    bool exhaustive; /* --oom: fail every allocation, not a sample */
    int32_t oom_runs;
} test_state;

#define TEST(function) {#function, function}

#define TEST_FAIL(...)                                                                             \
    do {                                                                                           \
        printf("FAILED\n  %s:%d: ", __FILE__, __LINE__);                                           \
        printf(__VA_ARGS__);                                                                       \
        printf("\n");                                                                              \
        longjmp(test_state.failed, 1);                                                             \
    } while (0)

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            TEST_FAIL("%s", #condition);                                                           \
        }                                                                                          \
    } while (0)

#define CHECK_INT(found, expected)                                                                 \
    do {                                                                                           \
        int64_t found_ = (int64_t)(found), expected_ = (int64_t)(expected);                        \
        if (found_ != expected_) {                                                                 \
            TEST_FAIL("%s: found %" PRId64 ", expected %" PRId64, #found, found_, expected_);      \
        }                                                                                          \
    } while (0)

#define CHECK_CLOSE(found, expected, tolerance)                                                    \
    do {                                                                                           \
        double found_ = (double)(found), expected_ = (double)(expected);                           \
        if (!(fabs(found_ - expected_) <= (tolerance))) {                                          \
            TEST_FAIL("%s: found %.17g, expected %.17g", #found, found_, expected_);               \
        }                                                                                          \
    } while (0)

#define CHECK_STRING(found, expected)                                                              \
    do {                                                                                           \
        const char *found_ = (found), *expected_ = (expected);                                     \
        if (!found_ || strcmp(found_, expected_) != 0) {                                           \
            TEST_FAIL("%s: found \"%s\", expected \"%s\"", #found, found_ ? found_ : "(null)",     \
                      expected_);                                                                  \
        }                                                                                          \
    } while (0)

#define CHECK_OK(expr)                                                                             \
    do {                                                                                           \
        ac_status status_ = (expr);                                                                \
        if (status_ < 0) {                                                                         \
            TEST_FAIL("%s: %s: %s", #expr, ac_status_text(status_), ac_error_message());           \
        }                                                                                          \
    } while (0)

/* The call fails with `code` and a message that contains `part`. */
#define CHECK_STATUS(expr, code, part)                                                             \
    do {                                                                                           \
        ac_status status_ = (expr), code_ = (code);                                                \
        const char *part_ = (part);                                                                \
        if (status_ != code_) {                                                                    \
            TEST_FAIL("%s: found %s (%s), expected %s", #expr, ac_status_text(status_),            \
                      status_ < 0 ? ac_error_message() : "no message", ac_status_text(code_));     \
        }                                                                                          \
        if (status_ < 0 && !strstr(ac_error_message(), part_)) {                                   \
            TEST_FAIL("%s: found the message \"%s\", expected \"%s\" in it", #expr,                \
                      ac_error_message(), part_);                                                  \
        }                                                                                          \
    } while (0)

/* xorshift64*: the same numbers in every run. */
static inline uint64_t
test_random(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * UINT64_C(0x2545f4914f6cdd1d);
}

static inline double
test_uniform(uint64_t *state, double low, double high)
{
    return low + (high - low) * (double)(test_random(state) >> 11) * 0x1p-53;
}

/* Bytes from a tensor's data to the end of its last element, whatever the strides. */
static inline size_t
test_extent(const ac_tensor *t)
{
    int64_t last = 0;
    for (int32_t d = 0; d < t->shape.rank; d++) {
        last += (t->shape.dim[d] - 1) * t->stride[d];
    }
    return (size_t)(last + 1) * ac_dtype_size(t->dtype);
}

/* Whether ac_alloc_fail_at(nth) is still waiting for its allocation.  Switches it off. */
static inline bool
test_failure_pending(int64_t nth)
{
    bool pending = false;
    for (int64_t i = 0; i < nth && !pending; i++) {
        void *memory = ac_malloc(1);
        pending = memory == NULL;
        ac_free(memory);
    }
    ac_alloc_fail_at(0);
    return pending;
}

/* Runs `scenario` with its 1st, 2nd, 3rd ... allocation failing, until none is left to fail.  It
 * must give AC_E_MEMORY (or do without the memory and succeed) and leave nothing behind; so it
 * cleans up on every path and uses no CHECK that a failed allocation can trip. */
static inline void
test_oom(ac_status (*scenario)(void *context), void *context)
{
    for (int64_t nth = 1;; nth += test_state.exhaustive || nth < 64 ? 1 : 1 + nth / 16) {
        int64_t live = ac_alloc_live();
        ac_alloc_fail_at(nth);
        ac_status status = scenario(context);
        bool done = test_failure_pending(nth);
        test_state.oom_runs++;
        if (status < 0 && (done || status != AC_E_MEMORY)) {
            TEST_FAIL("allocation %" PRId64 " failed: found %s (%s), expected %s", nth,
                      ac_status_text(status), ac_error_message(), ac_status_text(AC_E_MEMORY));
        }
        if (ac_alloc_live() != live) {
            TEST_FAIL("allocation %" PRId64 " failed: %" PRId64 " allocations leaked", nth,
                      ac_alloc_live() - live);
        }
        if (done) {
            return;
        }
    }
}

static inline bool
test_run(const test_row *row)
{
    int64_t live = ac_alloc_live();
    printf("  %-56s ", row->name);
    fflush(stdout);
    if (setjmp(test_state.failed)) {
        ac_alloc_fail_at(0);
        return false;
    }
    row->run();
    if (ac_alloc_live() != live) {
        printf("FAILED\n  %" PRId64 " allocations leaked\n", ac_alloc_live() - live);
        return false;
    }
    printf("ok\n");
    return true;
}

static inline int
test_main(int argc, char **argv, const test_row *rows, size_t count)
{
    const char *filter = "";
    bool list = false;
    int failures = 0;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--oom") == 0) {
            test_state.exhaustive = true;
        } else if (strcmp(argv[i], "--list") == 0) {
            list = true;
        } else {
            filter = argv[i];
        }
    }
    for (size_t i = 0; i < count; i++) {
        if (!strstr(rows[i].name, filter)) {
            continue;
        }
        if (list) {
            printf("%s\n", rows[i].name);
        } else {
            failures += !test_run(&rows[i]);
        }
    }
    if (test_state.oom_runs) {
        printf("  %d runs with a failed allocation\n", test_state.oom_runs);
    }
    return failures != 0;
}

#define TEST_MAIN(...)                                                                             \
    int main(int argc, char **argv)                                                                \
    {                                                                                              \
        static const test_row rows[] = {__VA_ARGS__};                                              \
        return test_main(argc, argv, rows, AC_ARRAY_LEN(rows));                                    \
    }

#endif
