/* safetensors: the header of a file in memory, every fact of it checked; no files here.
 *
 * A file is 8 bytes little-endian length, that many bytes of JSON, then the tensors' bytes:
 *     {"__metadata__": {"k": "v"}, "name": {"dtype": "F16", "shape": [2, 3],
 *      "data_offsets": [begin, end]}, ...}      offsets count from behind the JSON
 */
#ifndef AC_SAFETENSORS_H
#define AC_SAFETENSORS_H

#include "tensor.h"

typedef struct ac_safetensor {
    const char *name; /* in the arena */
    ac_dtype dtype;
    ac_shape shape;
    size_t offset; /* from the start of the file; any alignment */
    size_t bytes;  /* shape times dtype; offset + bytes lies inside the file */
} ac_safetensor;

typedef struct ac_safetensors {
    int32_t count;
    ac_safetensor *tensor; /* in the header's order, in the arena */
} ac_safetensors;

/* `file` [size] bytes; `path` names it in errors.  Reads nothing behind the header. */
ac_status ac_safetensors_parse(ac_arena *arena, const void *file, size_t size, const char *path,
                               ac_safetensors *out);

#endif
