/* fuzz: what a fuzzer gives its driver.
 *
 * A fuzzer is one file with LLVMFuzzerTestOneInput, so that libFuzzer can drive it too, and the
 * seeds and words below, for driver.c.  It aborts (FUZZ_CHECK) when something that must hold does
 * not; crashes are the sanitizers' to find, leaks and failed allocations the driver's.
 */
#ifndef AC_FUZZ_H
#define AC_FUZZ_H

#include "../../csrc/base.h"

#include <stdio.h>
#include <stdlib.h>

/* Inputs to start from, all of them accepted, and pieces of text worth inserting; NULL at the end
 * of each. */
extern const char *const fuzz_seeds[];
extern const char *const fuzz_words[];

/* 0: accepted, -1: refused. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define FUZZ_CHECK(condition)                                                                      \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition);         \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

#endif
