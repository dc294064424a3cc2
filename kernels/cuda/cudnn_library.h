/* cudnn_library: the entry points that cudnn_library.c finds. */
#ifndef AC_CUDA_CUDNN_LIBRARY_H
#define AC_CUDA_CUDNN_LIBRARY_H

#include "dnn.h"

#define AC_DNN_ENTRY_POINTS(X)                                                                     \
    X(GetVersion)                                                                                  \
    X(GetLastErrorString)                                                                          \
    X(Create)                                                                                      \
    X(Destroy)                                                                                     \
    X(SetStream)                                                                                   \
    X(BackendCreateDescriptor)                                                                     \
    X(BackendDestroyDescriptor)                                                                    \
    X(BackendFinalize)                                                                             \
    X(BackendSetAttribute)                                                                         \
    X(BackendGetAttribute)                                                                         \
    X(BackendExecute)

struct ac_dnn_library {
    size_t version; /* 91900; 0: none */
#define X(name) __typeof__(cudnn##name) *name;
    AC_DNN_ENTRY_POINTS(X)
#undef X
};

/* Complete after ac_dnn_found has said so. */
extern struct ac_dnn_library ac_dnn;

#endif
