/* tensor: tables of dtypes, shape helpers, scalar and bulk float conversion. */
#include "tensor.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

typedef struct dtype_row {
    size_t bytes;
    const char *tag, *name;
} dtype_row;

static const dtype_row dtypes[AC_DTYPE_COUNT] = {
#define X(name, bytes, tag, text) {bytes, tag, text},
    AC_DTYPE_MAP(X)
#undef X
};

size_t
ac_dtype_size(ac_dtype dtype)
{
    return dtypes[dtype].bytes;
}

const char *
ac_dtype_name(ac_dtype dtype)
{
    return dtypes[dtype].name;
}

bool
ac_dtype_from_name(const char *name, ac_dtype *out)
{
    for (int i = 0; i < AC_DTYPE_COUNT; i++) {
        if (strcmp(dtypes[i].name, name) == 0) {
            *out = (ac_dtype)i;
            return true;
        }
    }
    return false;
}

bool
ac_dtype_from_safetensors(const char *tag, ac_dtype *out)
{
    for (int i = 0; i < AC_DTYPE_COUNT; i++) {
        if (strcmp(dtypes[i].tag, tag) == 0) {
            *out = (ac_dtype)i;
            return true;
        }
    }
    return false;
}

bool
ac_dtype_is_float(ac_dtype dtype)
{
    return dtype == AC_F32 || dtype == AC_F16 || dtype == AC_BF16 || dtype == AC_F64;
}

/* ---- shapes --------------------------------------------------------------------------------- */

bool
ac_shape_equal(const ac_shape *a, const ac_shape *b)
{
    if (a->rank != b->rank) {
        return false;
    }
    for (int i = 0; i < a->rank; i++) {
        if (a->dim[i] != b->dim[i]) {
            return false;
        }
    }
    return true;
}

int64_t
ac_shape_count(const ac_shape *shape)
{
    int64_t count = 1;
    for (int i = 0; i < shape->rank; i++) {
        if (shape->dim[i] < 0 || !ac_mul_i64(count, shape->dim[i], &count)) {
            return -1;
        }
    }
    return count;
}

const char *
ac_shape_text(const ac_shape *shape, char buffer[AC_SHAPE_TEXT])
{
    int at = snprintf(buffer, AC_SHAPE_TEXT, "[");
    for (int i = 0; i < shape->rank; i++) {
        at += snprintf(buffer + at, (size_t)(AC_SHAPE_TEXT - at), i ? ", %lld" : "%lld",
                       (long long)shape->dim[i]);
    }
    snprintf(buffer + at, (size_t)(AC_SHAPE_TEXT - at), "]");
    return buffer;
}

void
ac_shape_strides(const ac_shape *shape, int64_t stride[AC_MAX_RANK])
{
    int64_t step = 1;
    memset(stride, 0, sizeof(int64_t) * AC_MAX_RANK);
    for (int i = shape->rank - 1; i >= 0; i--) {
        stride[i] = step;
        step *= AC_MAX(shape->dim[i], 1);
    }
}

ac_tensor
ac_tensor_of(void *data, ac_dtype dtype, ac_shape shape)
{
    ac_tensor tensor = {.data = data, .dtype = dtype, .shape = shape};
    ac_shape_strides(&shape, tensor.stride);
    return tensor;
}

bool
ac_tensor_is_contiguous(const ac_tensor *tensor)
{
    int64_t step = 1;
    for (int i = tensor->shape.rank - 1; i >= 0; i--) {
        if (tensor->shape.dim[i] != 1 && tensor->stride[i] != step) {
            return false;
        }
        step *= tensor->shape.dim[i];
    }
    return true;
}

int64_t
ac_tensor_count(const ac_tensor *tensor)
{
    return ac_shape_count(&tensor->shape);
}

size_t
ac_tensor_bytes(const ac_tensor *tensor)
{
    return (size_t)ac_shape_count(&tensor->shape) * ac_dtype_size(tensor->dtype);
}

bool
ac_tensor_rows(const ac_tensor *tensor, ac_rows *out)
{
    int last = tensor->shape.rank - 1;
    if (last < 0 || (tensor->shape.dim[last] != 1 && tensor->stride[last] != 1)) {
        return false;
    }
    *out = (ac_rows){.rows = 1, .columns = tensor->shape.dim[last], .row_stride = 0};
    for (int i = last - 1; i >= 0; i--) {
        if (tensor->shape.dim[i] == 1) {
            continue;
        }
        if (out->row_stride == 0) {
            out->row_stride = tensor->stride[i];
        } else if (tensor->stride[i] != out->row_stride * out->rows) {
            return false;
        }
        out->rows *= tensor->shape.dim[i];
    }
    if (out->row_stride == 0) {
        out->row_stride = out->columns;
    }
    return true;
}

/* ---- conversion ----------------------------------------------------------------------------- */

static float
bits_to_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t
float_to_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

float
ac_f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t exponent = (h >> 10) & 0x1fu, mantissa = h & 0x3ffu;
    if (exponent == 0x1f) {
        return bits_to_float(sign | 0x7f800000u | mantissa << 13);
    }
    if (exponent == 0) { /* zero or denormal: mantissa * 2^-24 */
        float value = (float)mantissa * 0x1p-24f;
        return sign ? -value : value;
    }
    return bits_to_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

uint16_t
ac_f32_to_f16(float value)
{
    uint32_t bits = float_to_bits(value);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits >= 0x7f800000u) { /* infinity, NaN (kept quiet) */
        return sign | (uint16_t)(bits > 0x7f800000u ? 0x7e00u : 0x7c00u);
    }
    if (bits >= 0x477ff000u) { /* rounds to 65536 or more */
        return sign | 0x7c00u;
    }
    if (bits < 0x38800000u) { /* denormal or zero: let the float adder round at 2^-24 */
        float shifted = bits_to_float(bits) + 0.5f;
        return sign | (uint16_t)(float_to_bits(shifted) - 0x3f000000u);
    }
    bits += 0xfffu + (bits >> 13 & 1);
    return sign | (uint16_t)((bits - 0x38000000u) >> 13);
}

float
ac_bf16_to_f32(uint16_t bits)
{
    return bits_to_float((uint32_t)bits << 16);
}

uint16_t
ac_f32_to_bf16(float value)
{
    uint32_t bits = float_to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return (uint16_t)(bits >> 16 | 0x40u);
    }
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

double
ac_element_get(const void *data, ac_dtype dtype, int64_t index)
{
    switch (dtype) {
    case AC_F32:
        return ((const float *)data)[index];
    case AC_F16:
        return ac_f16_to_f32(((const uint16_t *)data)[index]);
    case AC_BF16:
        return ac_bf16_to_f32(((const uint16_t *)data)[index]);
    case AC_F64:
        return ((const double *)data)[index];
    case AC_I64:
        return (double)((const int64_t *)data)[index];
    case AC_I32:
        return ((const int32_t *)data)[index];
    case AC_I16:
        return ((const int16_t *)data)[index];
    case AC_I8:
        return ((const int8_t *)data)[index];
    default:
        return ((const uint8_t *)data)[index];
    }
}

void
ac_element_set(void *data, ac_dtype dtype, int64_t index, double value)
{
    switch (dtype) {
    case AC_F32:
        ((float *)data)[index] = (float)value;
        break;
    case AC_F16:
        ((uint16_t *)data)[index] = ac_f32_to_f16((float)value);
        break;
    case AC_BF16:
        ((uint16_t *)data)[index] = ac_f32_to_bf16((float)value);
        break;
    case AC_F64:
        ((double *)data)[index] = value;
        break;
    case AC_I64:
        ((int64_t *)data)[index] = (int64_t)value;
        break;
    case AC_I32:
        ((int32_t *)data)[index] = (int32_t)value;
        break;
    case AC_I16:
        ((int16_t *)data)[index] = (int16_t)value;
        break;
    case AC_I8:
        ((int8_t *)data)[index] = (int8_t)value;
        break;
    default:
        ((uint8_t *)data)[index] = (uint8_t)value;
        break;
    }
}

/* One loop a pair, so that the compiler can vectorise it. */
#define CONVERT(to_t, from_t, expr)                                                                \
    do {                                                                                           \
        to_t *restrict out = to;                                                                   \
        const from_t *restrict in = from;                                                          \
        for (int64_t i = 0; i < count; i++) {                                                      \
            out[i] = expr;                                                                         \
        }                                                                                          \
        return;                                                                                    \
    } while (0)

void
ac_convert(void *to, ac_dtype to_dtype, const void *from, ac_dtype from_dtype, int64_t count)
{
    if (to_dtype == from_dtype) {
        memcpy(to, from, (size_t)count * ac_dtype_size(to_dtype));
        return;
    }
    if (to_dtype == AC_F32 && from_dtype == AC_F16) {
        CONVERT(float, uint16_t, ac_f16_to_f32(in[i]));
    }
    if (to_dtype == AC_F16 && from_dtype == AC_F32) {
        CONVERT(uint16_t, float, ac_f32_to_f16(in[i]));
    }
    if (to_dtype == AC_F32 && from_dtype == AC_BF16) {
        CONVERT(float, uint16_t, ac_bf16_to_f32(in[i]));
    }
    if (to_dtype == AC_BF16 && from_dtype == AC_F32) {
        CONVERT(uint16_t, float, ac_f32_to_bf16(in[i]));
    }
    for (int64_t i = 0; i < count; i++) {
        ac_element_set(to, to_dtype, i, ac_element_get(from, from_dtype, i));
    }
}
