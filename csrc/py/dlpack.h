/* dlpack: the structures of the DLPack exchange, as its ABI fixes them (dmlc/dlpack, versions 0.8
 * and 1.x).  Only what we read and write; the names are the standard's.
 *
 * A producer's capsule is named "dltensor" (legacy) or "dltensor_versioned"; the consumer renames
 * it to "used_..." and then owes one call of the deleter.
 */
#ifndef AC_PY_DLPACK_H
#define AC_PY_DLPACK_H

#include "py.h"

enum { DL_CPU = 1, DL_CUDA = 2, DL_CUDA_HOST = 3 };
enum { DL_INT = 0, DL_UINT = 1, DL_FLOAT = 2, DL_BFLOAT = 4, DL_COMPLEX = 5, DL_BOOL = 6 };
#define DL_FLAG_READ_ONLY UINT64_C(1)
#define DL_MAJOR 1 /* a capsule of another major version has another layout */

typedef struct DLDevice {
    int32_t device_type, device_id;
} DLDevice;

typedef struct DLDataType {
    uint8_t code, bits;
    uint16_t lanes; /* 1, but for vector types */
} DLDataType;

typedef struct DLTensor {
    void *data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t *shape;
    int64_t *strides; /* elements; NULL: contiguous in C order */
    uint64_t byte_offset;
} DLTensor;

typedef struct DLManagedTensor {
    DLTensor dl_tensor;
    void *manager_ctx;
    void (*deleter)(struct DLManagedTensor *self);
} DLManagedTensor;

typedef struct DLPackVersion {
    uint32_t major, minor;
} DLPackVersion;

typedef struct DLManagedTensorVersioned {
    DLPackVersion version;
    void *manager_ctx;
    void (*deleter)(struct DLManagedTensorVersioned *self);
    uint64_t flags;
    DLTensor dl_tensor;
} DLManagedTensorVersioned;

/* What a tensor library offers beside Python; its capsule is named "dlpack_exchange_api". */
typedef struct DLPackExchangeAPIHeader {
    DLPackVersion version;
    struct DLPackExchangeAPIHeader *prev_api; /* of another major version, or NULL */
} DLPackExchangeAPIHeader;

typedef struct DLPackExchangeAPI {
    DLPackExchangeAPIHeader header;
    /* A new tensor of the prototype's dtype, shape and device; 0 or -1. */
    int (*managed_tensor_allocator)(DLTensor *prototype, DLManagedTensorVersioned **out,
                                    void *context, void (*set_error)(void *context,
                                                                     const char *kind,
                                                                     const char *message));
    int (*managed_tensor_from_py_object_no_sync)(void *object, DLManagedTensorVersioned **out);
    int (*managed_tensor_to_py_object_no_sync)(DLManagedTensorVersioned *tensor, void **out);
    int (*dltensor_from_py_object_no_sync)(void *object, DLTensor *out);
    /* The calling thread's current stream. */
    int (*current_work_stream)(int32_t device_type, int32_t device_id, void **out);
} DLPackExchangeAPI;

/* Of DL_MAJOR; NULL: there is none, or with an exception the capsule is another's. */
const DLPackExchangeAPI *ac_py_exchange_api(PyObject *capsule);

#endif
