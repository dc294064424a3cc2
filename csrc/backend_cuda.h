/* backend_cuda: finds and opens libaccel_cuda.so on the first use of a GPU. */
#ifndef AC_BACKEND_CUDA_H
#define AC_BACKEND_CUDA_H

#include "device.h"

/* What the library exports under the name "ac_backend_cuda": fills *out.  Another ABI number is
 * refused before anything else of *host or *out is touched than out->abi, the library's number,
 * which is first in every build; the caller makes the message. */
typedef ac_status (*ac_backend_cuda_fn)(uint32_t abi, const ac_host *host, ac_backend *out);

/* Loads the library once; later calls give the same backend, or the same error again. */
ac_status ac_backend_cuda_load(const ac_backend **out);

/* Where to look, set by csrc/py: the folder of the Python package.  Copied. */
void ac_backend_cuda_set_folder(const char *folder);

#endif
