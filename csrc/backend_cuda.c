/* backend_cuda: the seam to the second library.  It has no Python and sees none of our symbols, so
 * it gets allocator, error setter and logger through ac_host. */
#include "backend_cuda.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#define LIBRARY "libaccel_cuda.so"

static char library_folder[1024];
static ac_backend backend;
static bool ready;

static void
host_log(int level, const char *message)
{
    ac_log(level, "%s", message);
}

static const ac_host host = {
    .abi = AC_ABI,
    .alloc = ac_malloc,
    .free = ac_free,
    .verror = ac_verror,
    .message = ac_error_message,
    .log = host_log,
};

void
ac_backend_cuda_set_folder(const char *folder)
{
    snprintf(library_folder, sizeof library_folder, "%s", folder);
}

static void *
open_library(void)
{
    char path[sizeof library_folder + sizeof LIBRARY + 1];
    snprintf(path, sizeof path, "%s%s" LIBRARY, library_folder, library_folder[0] ? "/" : "");
    return dlopen(path, RTLD_NOW | RTLD_LOCAL);
}

ac_status
ac_backend_cuda_load(const ac_backend **out)
{
    if (ready) {
        *out = &backend;
        return AC_OK;
    }
    void *library = open_library();
    if (!library) {
        return ac_error(AC_E_DEVICE, "cuda: this build has no usable " LIBRARY " (%.300s); it is "
                                     "built where nvcc is found when accel is installed",
                        dlerror());
    }
    ac_backend_cuda_fn fill;
    void *symbol = dlsym(library, "ac_backend_cuda");
    if (!symbol) {
        dlclose(library);
        return ac_error(AC_E_DEVICE, "cuda: " LIBRARY " does not export ac_backend_cuda");
    }
    memcpy(&fill, &symbol, sizeof fill); /* ISO C has no cast from object to function pointer */
    backend.abi = AC_ABI;
    ac_status status = fill(AC_ABI, &host, &backend);
    if (backend.abi != AC_ABI) { /* whether it refused or did not look */
        status = ac_error(AC_E_DEVICE, LIBRARY ": found ABI %u, expected %u; install both parts "
                                               "of accel from one build", backend.abi, AC_ABI);
    }
    if (status < 0) {
        dlclose(library);
        return status;
    }
    ready = true;
    *out = &backend;
    return AC_OK;
}
