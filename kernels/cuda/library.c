/* library: see library.h. */
#include "library.h"
#include "tune.h"

#include <dlfcn.h>
#include <glob.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- finding --------------------------------------------------------------------------------- */

static void *
open_in(const ac_library_search *s, const char *folder, int flags)
{
    char path[1024];
    void *library = NULL;
    for (int32_t i = 0; !library && i < s->n_names; i++) {
        snprintf(path, sizeof path, "%s%s%s", folder, *folder ? "/" : "", s->names[i]);
        library = dlopen(path, RTLD_LAZY | RTLD_LOCAL | flags);
    }
    return library;
}

/* site-packages/nvidia/cu13/lib, nvidia/cudnn/lib ...; `site` may have wildcards. */
static void *
open_in_site(const ac_library_search *s, const char *site)
{
    char pattern[1024];
    void *library = NULL;
    for (int32_t i = 0; !library && i < s->n_folders; i++) {
        glob_t found;
        snprintf(pattern, sizeof pattern, "%s/nvidia/%s/lib", site, s->folders[i]);
        if (glob(pattern, 0, NULL, &found) == 0) {
            for (size_t k = 0; !library && k < found.gl_pathc; k++) {
                library = open_in(s, found.gl_pathv[k], 0);
            }
            globfree(&found);
        }
    }
    return library;
}

/* `path` loses its last part. */
static bool
parent(char *path)
{
    char *slash = strrchr(path, '/');
    if (slash) {
        *slash = '\0';
    }
    return slash != NULL;
}

/* Packages beside ours, of the virtual environment, of the interpreter that runs. */
static void *
open_package(const ac_library_search *s)
{
    char path[800], site[900];
    Dl_info self;
    void *library = NULL;
    if (dladdr((void *)&open_package, &self) && self.dli_fname) {
        snprintf(path, sizeof path, "%s", self.dli_fname);
        library = parent(path) && parent(path) ? open_in_site(s, path) : NULL;
    }
    const char *environment = getenv("VIRTUAL_ENV");
    if (!library && environment) {
        snprintf(site, sizeof site, "%s/lib/python3*/site-packages", environment);
        library = open_in_site(s, site);
    }
    ssize_t length = library ? -1 : readlink("/proc/self/exe", path, sizeof path - 1);
    if (length > 0) {
        path[length] = '\0';
        if (parent(path) && parent(path)) {
            snprintf(site, sizeof site, "%s/lib/python3*/[sd]i[ts][et]-packages", path);
            library = open_in_site(s, site);
        }
    }
    return library;
}

void *
ac_cuda_library_open(const ac_library_search *s)
{
    char folder[900];
    const char *home = getenv("CUDA_HOME");
    void *library = open_in(s, "", RTLD_NOLOAD);
    library = library ? library : open_package(s);
    library = library ? library : open_in(s, "", 0);
    snprintf(folder, sizeof folder, "%s/lib64", home ? home : "/usr/local/cuda");
    return library ? library : open_in(s, folder, 0);
}

/* ---- what a device keeps --------------------------------------------------------------------- */

static pthread_mutex_t libraries_lock = PTHREAD_MUTEX_INITIALIZER;

ac_status
ac_cuda_libraries_enter(const ac_lane *lane, ac_cuda_libraries **out, int *previous)
{
    ac_cuda_libraries **slot = ac_cuda_libraries_slot(lane);
    AC_TRY(ac_cuda_enter(lane, previous));
    pthread_mutex_lock(&libraries_lock);
    if (!*slot) {
        ac_status status = ac_cuda_heap(sizeof **slot, (void **)slot);
        if (status < 0) {
            return ac_cuda_libraries_leave(lane, *previous, status);
        }
    }
    *out = *slot;
    return AC_OK;
}

ac_status
ac_cuda_libraries_leave(const ac_lane *lane, int previous, ac_status status)
{
    pthread_mutex_unlock(&libraries_lock);
    return ac_cuda_leave(lane, previous, status);
}

void
ac_cuda_libraries_free(ac_cuda_libraries *libraries)
{
    if (!libraries) {
        return;
    }
#ifdef AC_HAVE_CUBLASLT
    ac_cuda_blas_free(libraries->blas);
#endif
#ifdef AC_HAVE_CUDNN
    ac_cuda_dnn_free(libraries->dnn);
#endif
    ac_tune_free(libraries->tune);
    ac_cuda_host->free(libraries);
}

#ifndef AC_HAVE_CUBLASLT
bool
ac_cuda_describe_blas(char *text, size_t size)
{
    snprintf(text, size, "no cuBLASLt: its headers were missing when accel was built: own kernels "
                         "multiply, slower");
    return false;
}
#endif

#ifndef AC_HAVE_CUDNN
bool
ac_cuda_describe_dnn(char *text, size_t size)
{
    snprintf(text, size, "no cuDNN: its headers were missing when accel was built: own kernels "
                         "take convolutions and attention, slower");
    return false;
}
#endif

/* ---- services -------------------------------------------------------------------------------- */

void
ac_cuda_log(int level, const char *format, ...)
{
    char text[400];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    ac_cuda_host->log(level, text);
}

ac_status
ac_cuda_heap(size_t bytes, void **out)
{
    *out = ac_cuda_host->alloc(bytes);
    if (!*out) {
        return ac_cuda_fail(AC_E_MEMORY, "out of memory: %zu bytes were asked for", bytes);
    }
    memset(*out, 0, bytes);
    return AC_OK;
}

ac_status
ac_cuda_heap_grow(void **array, int32_t count, int32_t *capacity, size_t size)
{
    if (count < *capacity) {
        return AC_OK;
    }
    int32_t wanted = AC_MAX(2 * *capacity, 64);
    void *more;
    AC_TRY(ac_cuda_heap(size * (size_t)wanted, &more));
    if (count) {
        memcpy(more, *array, size * (size_t)count);
    }
    ac_cuda_host->free(*array);
    *array = more;
    *capacity = wanted;
    return AC_OK;
}

void *
ac_cuda_known_find(const ac_cuda_known *known, const void *key, size_t size)
{
    uint64_t hash = ac_tune_hash(AC_TUNE_HASH, key, size);
    for (int32_t i = 0; i < known->count; i++) {
        if (known->at[i].hash == hash && memcmp(known->at[i].item, key, size) == 0) {
            return known->at[i].item;
        }
    }
    return NULL;
}

ac_status
ac_cuda_known_add(ac_cuda_known *known, void *item, size_t key_size)
{
    AC_TRY(ac_cuda_heap_grow((void **)&known->at, known->count, &known->capacity,
                             sizeof *known->at));
    known->at[known->count++] =
        (struct ac_cuda_known_item){ac_tune_hash(AC_TUNE_HASH, item, key_size), item};
    return AC_OK;
}

void
ac_cuda_known_free(ac_cuda_known *known)
{
    for (int32_t i = 0; i < known->count; i++) {
        ac_cuda_host->free(known->at[i].item);
    }
    ac_cuda_host->free(known->at);
}
