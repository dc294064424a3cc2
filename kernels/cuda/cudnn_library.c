/* cudnn_library: cuDNN's entry points, and descriptions of graphs; see dnn.h.  Attribute types must
 * match exactly. */
#include "cudnn_library.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

/* ---- the library ----------------------------------------------------------------------------- */

struct ac_dnn_library ac_dnn;

static pthread_once_t dnn_once = PTHREAD_ONCE_INIT;
static const char *dnn_missing; /* why it is not used; NULL: it is */

/* Attention is compiled by NVRTC, which cuDNN opens by name: that of pip's packages is not where
 * the loader looks. */
static void
load_library(void)
{
    static const char *const names[] = {"libcudnn.so.9"}, *const folders[] = {"cudnn"};
    static const char *const compilers[] = {"libnvrtc.so.13", "libnvrtc.so.12"};
    static const char *const compiler_folders[] = {"cu13", "cuda_nvrtc"};
    void *library = ac_cuda_library_open(&(ac_library_search){names, 1, folders, 1});
    bool complete = library != NULL;
    if (!library) {
        dnn_missing = "no cuDNN 9 was found: own kernels take convolutions and attention, slower "
                      "(pip install nvidia-cudnn-cu13)";
        ac_cuda_log(1, "cuda: %s", dnn_missing);
        return;
    }
#define X(name)                                                                                    \
    *(void **)&ac_dnn.name = dlsym(library, "cudnn" #name);                                        \
    complete = complete && ac_dnn.name;
    AC_DNN_ENTRY_POINTS(X)
#undef X
    if (!complete) {
        dnn_missing = "cuDNN lacks entry points: own kernels take convolutions and attention, "
                      "slower";
        ac_cuda_log(1, "cuda: %s", dnn_missing);
        return;
    }
    if (!ac_cuda_library_open(&(ac_library_search){compilers, 2, compiler_folders, 2})) {
        ac_cuda_log(2, "cuda: no NVRTC was found: attention takes own kernels");
    }
    ac_dnn.version = ac_dnn.GetVersion();
    ac_cuda_log(2, "cuda: cuDNN %zu", ac_dnn.version);
}

bool
ac_dnn_found(int32_t minor)
{
    pthread_once(&dnn_once, load_library);
    return ac_dnn.version >= (size_t)(90000 + 100 * minor);
}

bool
ac_cuda_describe_dnn(char *text, size_t size)
{
    if (!ac_dnn_found(0)) {
        snprintf(text, size, "%s", dnn_missing ? dnn_missing : "cuDNN is older than 9.0: own "
                                                               "kernels take its place, slower");
        return false;
    }
    snprintf(text, size, "cuDNN %zu.%zu.%zu", ac_dnn.version / 10000, ac_dnn.version / 100 % 100,
             ac_dnn.version % 100);
    return true;
}

/* ---- descriptions ---------------------------------------------------------------------------- */

ac_dnn_descriptor
ac_dnn_begin(ac_dnn_graph *g, cudnnBackendDescriptorType_t type)
{
    ac_dnn_descriptor d = NULL;
    if (g->status == CUDNN_STATUS_SUCCESS && g->n_made == (int32_t)AC_ARRAY_LEN(g->made)) {
        g->status = CUDNN_STATUS_BAD_PARAM;
    }
    if (g->status == CUDNN_STATUS_SUCCESS) {
        g->status = ac_dnn.BackendCreateDescriptor(type, &d);
    }
    if (g->status == CUDNN_STATUS_SUCCESS) {
        g->made[g->n_made++] = d;
    }
    return d;
}

void
ac_dnn_set(ac_dnn_graph *g, ac_dnn_descriptor d, cudnnBackendAttributeName_t name,
           cudnnBackendAttributeType_t type, int64_t count, const void *values)
{
    if (g->status == CUDNN_STATUS_SUCCESS) {
        g->status = ac_dnn.BackendSetAttribute(d, name, type, count, values);
    }
}

void
ac_dnn_set_part(ac_dnn_graph *g, ac_dnn_descriptor d, cudnnBackendAttributeName_t name,
                ac_dnn_descriptor part)
{
    ac_dnn_set(g, d, name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &part);
}

void
ac_dnn_end(ac_dnn_graph *g, ac_dnn_descriptor d, bool operation)
{
    if (g->status == CUDNN_STATUS_SUCCESS) {
        g->status = ac_dnn.BackendFinalize(d);
    }
    if (operation && g->n_operations < (int32_t)AC_ARRAY_LEN(g->operation)) {
        g->operation[g->n_operations++] = d;
    }
}

static cudnnDataType_t
type_of(ac_dtype dtype)
{
    return dtype == AC_F16    ? CUDNN_DATA_HALF
           : dtype == AC_BF16 ? CUDNN_DATA_BFLOAT16
                              : CUDNN_DATA_FLOAT;
}

ac_dnn_descriptor
ac_dnn_tensor_new(ac_dnn_graph *g, const ac_dnn_tensor *t)
{
    ac_dnn_descriptor d = ac_dnn_begin(g, CUDNN_BACKEND_TENSOR_DESCRIPTOR);
    cudnnDataType_t type = type_of(t->dtype);
    int64_t alignment = 16;
    ac_dnn_set(g, d, CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, 1, &t->id);
    ac_dnn_set(g, d, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &type);
    ac_dnn_set(g, d, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, 1, &alignment);
    ac_dnn_set(g, d, CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, t->dim);
    ac_dnn_set(g, d, CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, t->stride);
    if (t->inner) {
        ac_dnn_set(g, d, CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, 1, &t->inner);
    }
    if (t->by_value) {
        ac_dnn_set(g, d, CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, 1, &t->by_value);
    }
    ac_dnn_end(g, d, false);
    return d;
}

void
ac_dnn_add(ac_dnn_graph *g, ac_dnn_descriptor a, ac_dnn_descriptor b, ac_dnn_descriptor y)
{
    cudnnDataType_t precision = CUDNN_DATA_FLOAT;
    cudnnPointwiseMode_t mode = CUDNN_POINTWISE_ADD;
    ac_dnn_descriptor how = ac_dnn_begin(g, CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
    ac_dnn_set(g, how, CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &mode);
    ac_dnn_set(g, how, CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_TYPE_DATA_TYPE, 1, &precision);
    ac_dnn_end(g, how, false);
    ac_dnn_descriptor op = ac_dnn_begin(g, CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
    ac_dnn_set_part(g, op, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, how);
    ac_dnn_set_part(g, op, CUDNN_ATTR_OPERATION_POINTWISE_XDESC, a);
    ac_dnn_set_part(g, op, CUDNN_ATTR_OPERATION_POINTWISE_BDESC, b);
    ac_dnn_set_part(g, op, CUDNN_ATTR_OPERATION_POINTWISE_YDESC, y);
    ac_dnn_end(g, op, true);
}
