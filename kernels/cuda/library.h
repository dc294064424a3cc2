/* library: NVIDIA's libraries: where they are found, and what a device keeps of them.
 *
 * They are never linked.  A library is taken from the process (PyTorch's), then from NVIDIA's pip
 * packages, the system and CUDA_HOME, so that none is in memory twice, and stays open.
 *
 * Handles are not thread-safe and choices are shared: ac_cuda_libraries_enter holds one lock until
 * ac_cuda_libraries_leave.  Launching takes microseconds; the first use of a problem, when ways to
 * do it are measured, milliseconds.
 */
#ifndef AC_CUDA_LIBRARY_H
#define AC_CUDA_LIBRARY_H

#include "cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ac_cuda_blas ac_cuda_blas; /* cublaslt.c's */
typedef struct ac_cuda_dnn ac_cuda_dnn;   /* cudnn.c's */
typedef struct ac_tune ac_tune;           /* tune.c's */

/* One a device, made at first use.  Each part is NULL until its file needs it. */
struct ac_cuda_libraries {
    ac_cuda_blas *blas;
    ac_cuda_dnn *dnn;
    ac_tune *tune;
};

/* Takes the lock, and makes the lane's device current; both end with leave, which passes `status`
 * on. */
ac_status ac_cuda_libraries_enter(const ac_lane *lane, ac_cuda_libraries **out, int *previous);
ac_status ac_cuda_libraries_leave(const ac_lane *lane, int previous, ac_status status);

/* The first library that opens: names are sonames, newest first; folders are those of the pip
 * packages under site-packages/nvidia.  NULL: there is none. */
typedef struct ac_library_search {
    const char *const *names;
    int32_t n_names;
    const char *const *folders;
    int32_t n_folders;
} ac_library_search;

void *ac_cuda_library_open(const ac_library_search *search);
/* The version that is used; false: none, and what that means, in one sentence. */
bool ac_cuda_describe_blas(char *text, size_t size);
bool ac_cuda_describe_dnn(char *text, size_t size);

void ac_cuda_log(int level, const char *format, ...) AC_PRINTF(2, 3);
/* Zeroed memory of the host's allocator, or the out-of-memory status. */
ac_status ac_cuda_heap(size_t bytes, void **out);
/* An array of `size`-byte items that holds `count` of `*capacity` grows to hold one more. */
ac_status ac_cuda_heap_grow(void **array, int32_t count, int32_t *capacity, size_t size);

/* What was found for keys: each item begins with its key, and is the host's memory.  By hash, as a
 * process that goes through many sizes has thousands. */
typedef struct ac_cuda_known {
    struct ac_cuda_known_item {
        uint64_t hash;
        void *item;
    } *at;
    int32_t count, capacity;
} ac_cuda_known;

/* NULL: none. */
void *ac_cuda_known_find(const ac_cuda_known *known, const void *key, size_t size);
/* Takes the item over. */
ac_status ac_cuda_known_add(ac_cuda_known *known, void *item, size_t key_size);
/* The items too, but not what they refer to. */
void ac_cuda_known_free(ac_cuda_known *known);

/* Of the parts; nothing when NULL. */
void ac_cuda_blas_free(ac_cuda_blas *blas);
void ac_cuda_dnn_free(ac_cuda_dnn *dnn);
void ac_tune_free(ac_tune *tune);

#ifdef __cplusplus
}
#endif

#endif
