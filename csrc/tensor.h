/* tensor: dtypes, shapes and views.  A view owns nothing.
 *
 * Dimensions are in NumPy order, outermost first.  Strides count elements, not bytes.  Inside the
 * engine images are NHWC, [batch, height, width, channels], and tokens are
 * [batch, tokens, channels]; PyTorch's NCHW exists only at graph inputs and outputs.
 */
#ifndef AC_TENSOR_H
#define AC_TENSOR_H

#include "base.h"

#define AC_MAX_RANK 6

/* name, bytes, safetensors' name, text */
#define AC_DTYPE_MAP(X)                                                                            \
    X(F32, 4, "F32", "float32")                                                                    \
    X(F16, 2, "F16", "float16")                                                                    \
    X(BF16, 2, "BF16", "bfloat16")                                                                 \
    X(F64, 8, "F64", "float64")                                                                    \
    X(I64, 8, "I64", "int64")                                                                      \
    X(I32, 4, "I32", "int32")                                                                      \
    X(I16, 2, "I16", "int16")                                                                      \
    X(I8, 1, "I8", "int8")                                                                         \
    X(U8, 1, "U8", "uint8")                                                                        \
    X(BOOL, 1, "BOOL", "bool")

typedef enum ac_dtype {
#define X(name, bytes, tag, text) AC_##name,
    AC_DTYPE_MAP(X)
#undef X
    AC_DTYPE_COUNT
} ac_dtype;

size_t ac_dtype_size(ac_dtype dtype);
const char *ac_dtype_name(ac_dtype dtype);                       /* "float16" */
bool ac_dtype_from_name(const char *name, ac_dtype *out);        /* "float16" */
bool ac_dtype_from_safetensors(const char *tag, ac_dtype *out);  /* "F16" */
bool ac_dtype_is_float(ac_dtype dtype);

typedef struct ac_shape {
    int32_t rank;
    int64_t dim[AC_MAX_RANK]; /* entries past rank are 0 */
} ac_shape;

/* AC_SHAPE(2, 77, 768) */
#define AC_SHAPE(...)                                                                              \
    ((ac_shape){(int32_t)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), {__VA_ARGS__}})

bool ac_shape_equal(const ac_shape *a, const ac_shape *b);
/* Elements; -1 on overflow or a negative dimension. */
int64_t ac_shape_count(const ac_shape *shape);
/* "[2, 77, 768]" into a buffer of the caller; returns the buffer. */
#define AC_SHAPE_TEXT 144
const char *ac_shape_text(const ac_shape *shape, char buffer[AC_SHAPE_TEXT]);

typedef struct ac_tensor {
    void *data; /* device or host address */
    ac_dtype dtype;
    ac_shape shape;
    int64_t stride[AC_MAX_RANK]; /* elements */
} ac_tensor;

void ac_shape_strides(const ac_shape *shape, int64_t stride[AC_MAX_RANK]); /* contiguous */
ac_tensor ac_tensor_of(void *data, ac_dtype dtype, ac_shape shape);        /* contiguous view */
bool ac_tensor_is_contiguous(const ac_tensor *tensor);
int64_t ac_tensor_count(const ac_tensor *tensor);
size_t ac_tensor_bytes(const ac_tensor *tensor); /* of a contiguous tensor of this shape */

/* The last dimension as columns, all others as rows at one distance: how GEMM, norms and
 * elementwise kernels see a tensor.  False when the rows are not evenly spaced. */
typedef struct ac_rows {
    int64_t rows, columns, row_stride; /* elements */
} ac_rows;
bool ac_tensor_rows(const ac_tensor *tensor, ac_rows *out);

float ac_f16_to_f32(uint16_t bits);
uint16_t ac_f32_to_f16(float value); /* round to nearest even, overflow to infinity */
float ac_bf16_to_f32(uint16_t bits);
uint16_t ac_f32_to_bf16(float value);

/* Element `index` (in elements from data) as double, and back.  Slow; edges and oracles only. */
double ac_element_get(const void *data, ac_dtype dtype, int64_t index);
void ac_element_set(void *data, ac_dtype dtype, int64_t index, double value);
/* Contiguous conversion between float dtypes (f16, bf16, f32, f64), fast for the common pairs. */
void ac_convert(void *to, ac_dtype to_dtype, const void *from, ac_dtype from_dtype, int64_t count);

#endif
