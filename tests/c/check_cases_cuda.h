/* check_cases_cuda: what the CUDA kernels are checked on beside check_cases.h: sizes and views that
 * their 16-byte loads take, and SDXL's and the VAE's shapes. */
#ifndef CHECK_CASES_CUDA_H
#define CHECK_CASES_CUDA_H

#include "check_cases.h"

/* So many pixels that conv2d.narrow gives a warp four lines, with edges, and more rounds than it
 * has in shared memory. */
static void
narrow_cases(case_list *list)
{
    for (int variant = 0; variant < 2; variant++) {
        check_case *c = CASE(list, AC_OP_CONV2D, AC_SHAPE(1, 260, 254, 96), AC_SHAPE(2, 96, 3, 3),
                             AC_SHAPE(2), variant ? AC_SHAPE(1, 260, 254, 2) : absent);
        c->attr.conv2d =
            (ac_conv2d_attr){1, 1, 1, 1, 1, variant ? AC_ACT_SILU : AC_ACT_NONE};
        c->strided = variant;
    }
}

/* Channels in eights, so that the tensor-core kernels take them, each attribute at least once. */
static void
aligned_cases(case_list *list)
{
    /* batch, height, width, c_in, c of x2, c_out, kernel, stride, padding before, after */
    static const int32_t conv[][10] = {
        {1, 9, 8, 16, 24, 24, 3, 1, 1, 1},  {2, 7, 5, 8, 0, 10, 3, 2, 0, 1},
        {1, 5, 6, 40, 8, 16, 1, 1, 0, 0},   {1, 20, 20, 32, 32, 130, 3, 1, 1, 1},
        {3, 16, 16, 48, 0, 72, 3, 2, 1, 1}, {1, 6, 6, 64, 64, 7, 5, 1, 2, 2},
        {2, 32, 32, 72, 0, 264, 3, 1, 1, 1}, {2, 7, 37, 32, 0, 4, 3, 1, 1, 1},
        {1, 33, 18, 64, 0, 8, 3, 1, 0, 1},   {1, 5, 3, 96, 0, 1, 3, 1, 0, 0}};
    for (size_t i = 0; i < AC_ARRAY_LEN(conv); i++) {
        const int32_t *s = conv[i];
        for (int variant = 0; variant < 4; variant++) {
            check_case *c = CASE(list, AC_OP_CONV2D, AC_SHAPE(s[0], s[1], s[2], s[3]),
                                 AC_SHAPE(s[5], s[3] + s[4], s[6], s[6]), AC_SHAPE(s[5]), absent,
                                 s[4] ? AC_SHAPE(s[0], s[1], s[2], s[4]) : absent);
            c->attr.conv2d =
                (ac_conv2d_attr){s[7], s[8], s[8], s[9], s[9], (ac_act)(variant % AC_ACT_COUNT)};
            c->strided = variant >= 2;
            if (variant & 1) {
                AC_TRY_CASE(ac_op_shape(c->op, &c->attr, c->shape, c->n_inputs,
                                        &c->shape[AC_CONV_RESIDUAL]));
            }
        }
    }
    static const int32_t up[][5] = {{1, 1, 1, 8, 8}, {2, 5, 7, 16, 24}, {3, 9, 8, 40, 8}};
    for (size_t i = 0; i < 2 * AC_ARRAY_LEN(up); i++) {
        const int32_t *s = up[i / 2];
        CASE(list, AC_OP_UP_CONV2D, AC_SHAPE(s[0], s[1], s[2], s[3]), AC_SHAPE(4, s[4], s[3], 2, 2),
             i & 1 ? AC_SHAPE(s[4]) : absent);
    }
    for (int variant = 0; variant < 6; variant++) { /* 128 x 128 tiles, with edges */
        int64_t m = 1300, n = 1288, k = 72;
        bool gated = variant == 2, two = variant == 3;
        check_case *c = CASE(list, AC_OP_LINEAR, AC_SHAPE(2, m / 2, two ? 40 : k),
                             AC_SHAPE(gated ? 2 * n : n, k), AC_SHAPE(gated ? 2 * n : n),
                             AC_SHAPE(2, m / 2, n), AC_SHAPE(2, m / 2, k - 40));
        c->shape[AC_LINEAR_RESIDUAL] = variant & 1 ? c->shape[AC_LINEAR_RESIDUAL] : absent;
        c->shape[AC_LINEAR_X2] = two ? c->shape[AC_LINEAR_X2] : absent;
        c->shape[AC_LINEAR_B] = variant == 4 ? absent : c->shape[AC_LINEAR_B];
        c->attr.linear = (ac_linear_attr){gated ? AC_ACT_GELU : AC_ACT_NONE, gated};
        c->strided = variant >= 4;
    }
    /* images, queries, keys, heads, head size: several tiles of keys, the diagonal in each */
    static const int32_t attention[][5] = {{2, 200, 200, 2, 40}, {1, 130, 130, 3, 64},
                                           {1, 70, 70, 2, 160},  {1, 150, 150, 2, 512},
                                           {2, 33, 333, 2, 80},  {1, 300, 20, 1, 200},
                                           {1, 130, 1032, 1, 512}, {2, 40, 64, 2, 168}};
    for (size_t i = 0; i < AC_ARRAY_LEN(attention); i++) {
        const int32_t *s = attention[i];
        for (int variant = 0; variant < 4; variant++) {
            int64_t c = s[3] * s[4];
            check_case *k = CASE(list, AC_OP_ATTENTION, AC_SHAPE(s[0], s[1], c),
                                 AC_SHAPE(s[0], s[2], c), AC_SHAPE(s[0], s[2], c),
                                 AC_SHAPE(s[0], s[2]));
            k->shape[AC_ATTN_MASK] = variant == 1 ? k->shape[AC_ATTN_MASK] : absent;
            k->attr.attention = (ac_attention_attr){.heads = s[3],
                                                    .scale = (float)(1.0 / sqrt(s[4])),
                                                    .causal = variant == 2 && s[1] == s[2]};
            k->strided = variant == 3;
        }
    }
}

/* Groups that cross vectors, one or many of a tile; fewer pixels than threads, or than blocks. */
static void
vector_norm_cases(case_list *list)
{
    static const int32_t norm[][6] = {
        {1, 1, 1, 8, 1, 0},      {3, 1, 1, 320, 4, 0},   {2, 1, 3, 64, 8, 0},
        {2, 7, 9, 320, 32, 0},   {1, 17, 13, 96, 32, 0}, {1, 9, 9, 160, 32, 64},
        {2, 13, 11, 640, 32, 320}, {1, 33, 31, 128, 32, 0}, {1, 40, 41, 8, 1, 0},
        {2, 5, 5, 1280, 32, 1280}, {1, 3, 5, 80, 1, 0},   {1, 20, 61, 64, 8, 32},
        {1, 65, 67, 24, 2, 16},  {1, 2, 2, 4096, 2, 0},  {1, 4, 3, 1040, 130, 0}};
    for (size_t i = 0; i < AC_ARRAY_LEN(norm); i++) {
        group_norm_cases(list, norm[i], i % 4 == 0 ? -3 : 0);
    }
    static const int64_t layers[][2] = {{1, 8},    {5, 64},   {7, 128},  {33, 320}, {9, 336},
                                        {6, 768},  {17, 640}, {5, 1280}, {3, 1000}, {2, 2048},
                                        {2, 2560}, {2, 2600}};
    for (size_t i = 0; i < AC_ARRAY_LEN(layers); i++) {
        for (int variant = 0; variant < 2; variant++) {
            layer_norm_case(list, layers[i][0], layers[i][1])->strided = variant;
        }
    }
}

static void
real_norm_cases(case_list *list)
{
    static const int32_t norm[][4] = {{2, 8, 1280, 0},   {2, 64, 640, 320},  {2, 128, 320, 0},
                                      {2, 64, 640, 0},   {2, 64, 1280, 640}, {2, 32, 1280, 0},
                                      {2, 32, 1280, 1280}, {1, 128, 512, 0}, {1, 512, 256, 0}};
    for (size_t i = 0; i < AC_ARRAY_LEN(norm); i++) {
        real_group_norm(list, norm[i]);
    }
    static const int64_t layers[][2] = {{2048, 640}, {512, 1280}, {8192, 640}, {2048, 1280}};
    for (size_t i = 0; i < AC_ARRAY_LEN(layers); i++) {
        layer_norm_case(list, layers[i][0], layers[i][1])->real = true;
    }
}

static void
real_cuda_cases(case_list *list)
{
    static const int64_t linear[][3] = {{2048, 3840, 1280}, {2048, 10240, 1280},
                                        {2048, 1280, 5120}, {8192, 640, 640},
                                        {8192, 1920, 640},  {8192, 5120, 640},
                                        {8192, 640, 2560}};
    for (size_t i = 0; i < AC_ARRAY_LEN(linear); i++) {
        const int64_t *s = linear[i];
        check_case *c = CASE(list, AC_OP_LINEAR, AC_SHAPE(s[0], s[2]), AC_SHAPE(s[1], s[2]),
                             AC_SHAPE(s[1]), i & 1 ? absent : AC_SHAPE(s[0], s[1]));
        c->real = true;
    }
    /* rows, columns, channels, those of x2, gated, activation: GEGLU, shortcuts, texts, time */
    static const int32_t parts[][6] = {{8192, 1280, 320, 0, 1, AC_ACT_GELU},
                                       {2048, 5120, 1280, 0, 1, AC_ACT_GELU},
                                       {8192, 320, 320, 320, 0, AC_ACT_NONE},
                                       {2048, 1280, 1280, 640, 0, AC_ACT_NONE},
                                       {154, 3072, 768, 0, 0, AC_ACT_QUICK_GELU},
                                       {154, 5120, 1280, 0, 0, AC_ACT_GELU},
                                       {2, 1280, 320, 0, 0, AC_ACT_SILU}};
    for (size_t i = 0; i < AC_ARRAY_LEN(parts); i++) {
        const int32_t *s = parts[i];
        int64_t n = s[4] ? 2 * s[1] : s[1];
        check_case *c = CASE(list, AC_OP_LINEAR, AC_SHAPE(s[0], s[2]), AC_SHAPE(n, s[2] + s[3]),
                             AC_SHAPE(n), absent, s[3] ? AC_SHAPE(s[0], s[3]) : absent);
        c->attr.linear = (ac_linear_attr){(ac_act)s[5], s[4]};
        c->real = true;
    }
    static const int32_t conv[][4] = {{2, 128, 320, 320}, {2, 64, 640, 640}, {2, 32, 1280, 1280},
                                      {2, 32, 2560, 1280}, {1, 512, 256, 256}, {1, 512, 128, 128},
                                      {1, 64, 512, 8}, {1, 512, 128, 3}};
    for (size_t i = 0; i < AC_ARRAY_LEN(conv); i++) {
        const int32_t *s = conv[i];
        check_case *c = CASE(list, AC_OP_CONV2D, AC_SHAPE(s[0], s[1], s[1], s[2]),
                             AC_SHAPE(s[3], s[2], 3, 3), AC_SHAPE(s[3]),
                             AC_SHAPE(s[0], s[1], s[1], s[3]));
        c->attr.conv2d = (ac_conv2d_attr){1, 1, 1, 1, 1, AC_ACT_NONE};
        c->real = true;
    }
    static const int32_t up[][3] = {{2, 32, 640}, {2, 16, 1280}, {2, 32, 1280}, {1, 128, 512},
                                    {1, 256, 512}, {1, 256, 256}};
    for (size_t i = 0; i < AC_ARRAY_LEN(up); i++) {
        const int32_t *s = up[i];
        CASE(list, AC_OP_UP_CONV2D, AC_SHAPE(s[0], s[1], s[1], s[2]),
             AC_SHAPE(4, s[2], s[2], 2, 2), AC_SHAPE(s[2]))
            ->real = true;
    }
    static const int32_t attention[][5] = {{2, 4096, 4096, 10, 64}, {2, 4096, 77, 10, 64},
                                           {2, 1024, 77, 20, 64},  {1, 16384, 16384, 1, 512},
                                           {1, 200, 16392, 1, 512}};
    for (size_t i = 0; i < AC_ARRAY_LEN(attention); i++) {
        const int32_t *s = attention[i];
        int64_t c = s[3] * s[4];
        check_case *k = CASE(list, AC_OP_ATTENTION, AC_SHAPE(s[0], s[1], c),
                             AC_SHAPE(s[0], s[2], c), AC_SHAPE(s[0], s[2], c));
        k->attr.attention =
            (ac_attention_attr){.heads = s[3], .scale = (float)(1.0 / sqrt(s[4]))};
        k->real = true;
    }
}

static void
cuda_cases(case_list *list)
{
    aligned_cases(list);
    narrow_cases(list);
    vector_norm_cases(list);
    real_norm_cases(list);
    real_cuda_cases(list);
}

#endif
