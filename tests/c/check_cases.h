/* check_cases: the problems that every kernel is checked on.
 *
 * Small ones with odd sizes, views and all attributes, checked in full; and the shapes of the
 * published models, checked by sample and timed by --bench.
 */
#ifndef CHECK_CASES_H
#define CHECK_CASES_H

#include "check_kernels.h"

typedef struct case_list {
    check_case *at;
    int32_t count, capacity;
} case_list;

static const ac_shape absent = {.rank = -1};

static check_case *
add_case(case_list *list, ac_op op, const ac_shape *shape, int32_t n_inputs)
{
    if (list->count == list->capacity) {
        list->capacity = AC_MAX(list->capacity * 2, 256);
        list->at = realloc(list->at, sizeof *list->at * (size_t)list->capacity);
    }
    check_case *c = &list->at[list->count++];
    *c = (check_case){.op = op, .n_inputs = n_inputs, .out_dtype = AC_F32};
    memcpy(c->shape, shape, sizeof *shape * (size_t)n_inputs);
    return c;
}

/* Cases are ours, so a shape that is refused is a bug of this file. */
#define AC_TRY_CASE(expr)                                                                          \
    do {                                                                                           \
        if ((expr) < 0) {                                                                          \
            fprintf(stderr, "bad case: %s\n", ac_error_message());                                 \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

#define CASE(list, op, ...)                                                                        \
    add_case(list, op, (const ac_shape[]){__VA_ARGS__},                                            \
             (int32_t)(sizeof((const ac_shape[]){__VA_ARGS__}) / sizeof(ac_shape)))

/* ---- GEMM-like ------------------------------------------------------------------------------- */

static void
linear_cases(case_list *list)
{
    static const int64_t small[][3] = {{1, 1, 1},    {1, 40, 17},  {2, 33, 64},   {3, 7, 5},
                                       {13, 31, 33}, {14, 32, 48}, {15, 65, 100}, {29, 97, 130},
                                       {57, 96, 64}, {100, 16, 257}, {154, 80, 768}, {300, 130, 40},
                                       {16, 320, 1280}, {17, 320, 320}, {257, 70, 1031}};
    for (size_t i = 0; i < AC_ARRAY_LEN(small); i++) {
        int64_t m = small[i][0], n = small[i][1], k = small[i][2];
        for (int variant = 0; variant < 6; variant++) {
            bool two = variant == 3 && k > 1;
            check_case *c = CASE(list, AC_OP_LINEAR, AC_SHAPE(1, m, two ? k / 2 : k),
                                 AC_SHAPE(variant == 2 ? 2 * n : n, k),
                                 AC_SHAPE(variant == 2 ? 2 * n : n), AC_SHAPE(1, m, n),
                                 AC_SHAPE(1, m, k - k / 2));
            c->shape[AC_LINEAR_B] = variant == 0 ? absent : c->shape[AC_LINEAR_B];
            c->shape[AC_LINEAR_RESIDUAL] = variant & 1 ? c->shape[AC_LINEAR_RESIDUAL] : absent;
            c->shape[AC_LINEAR_X2] = two ? c->shape[AC_LINEAR_X2] : absent;
            c->attr.linear.gated = variant == 2;
            ac_act other = (ac_act)((i + variant) % AC_ACT_COUNT);
            c->attr.linear.act = variant == 2 ? AC_ACT_GELU : other;
            c->strided = variant >= 4;
        }
    }
    static const int64_t real[][3] = {
        {8192, 320, 320},  {8192, 960, 320},  {8192, 2560, 320}, {8192, 320, 1280},
        {2048, 640, 640},  {2048, 1920, 640}, {2048, 5120, 640}, {2048, 640, 2560},
        {512, 1280, 1280}, {512, 10240, 1280}, {512, 1280, 5120}, {128, 1280, 1280},
        {154, 320, 768},   {154, 768, 768},   {154, 3072, 768},  {154, 768, 3072},
        {2, 1280, 320},    {2, 1280, 1280},   {2, 320, 1280},    {4096, 512, 512},
        {2048, 1280, 1280}};
    for (size_t i = 0; i < AC_ARRAY_LEN(real); i++) {
        check_case *c = CASE(list, AC_OP_LINEAR, AC_SHAPE(real[i][0], real[i][2]),
                             AC_SHAPE(real[i][1], real[i][2]), AC_SHAPE(real[i][1]));
        c->real = true;
    }
}

static void
conv_cases(case_list *list)
{
    /* batch, height, width, c_in, c_out, kernel, stride, padding */
    static const int32_t small[][8] = {
        {1, 1, 1, 3, 5, 3, 1, 1},    {2, 5, 7, 4, 33, 3, 1, 1},   {1, 9, 8, 17, 16, 1, 1, 0},
        {3, 6, 5, 8, 40, 3, 2, 1},   {1, 11, 13, 35, 65, 3, 1, 1}, {1, 8, 8, 4, 4, 3, 1, 0},
        {1, 7, 7, 3, 20, 5, 2, 2},   {2, 16, 15, 64, 48, 3, 1, 1}, {1, 4, 40, 9, 7, 3, 1, 1},
        {1, 12, 12, 130, 96, 3, 2, 1}};
    for (size_t i = 0; i < AC_ARRAY_LEN(small); i++) {
        const int32_t *s = small[i];
        for (int variant = 0; variant < 5; variant++) {
            bool two = variant == 2;
            check_case *c = CASE(list, AC_OP_CONV2D, AC_SHAPE(s[0], s[1], s[2], s[3]),
                                 AC_SHAPE(s[4], s[3] + (two ? 6 : 0), s[5], s[5]), AC_SHAPE(s[4]),
                                 absent, two ? AC_SHAPE(s[0], s[1], s[2], 6) : absent);
            int32_t one_sided = variant == 3 && s[6] == 2; /* the VAE's downsampler */
            c->attr.conv2d = (ac_conv2d_attr){.stride = s[6],
                                              .pad_top = one_sided ? 0 : s[7],
                                              .pad_left = one_sided ? 0 : s[7],
                                              .pad_bottom = s[7],
                                              .pad_right = s[7],
                                              .act = (ac_act)((i + variant) % AC_ACT_COUNT)};
            c->strided = variant == 4;
            if (variant == 0) {
                c->shape[AC_CONV_B] = absent;
            }
            if (variant & 1) {
                AC_TRY_CASE(ac_op_shape(c->op, &c->attr, c->shape, c->n_inputs,
                                        &c->shape[AC_CONV_RESIDUAL]));
            }
        }
    }
    static const int32_t real[][6] = {{2, 64, 320, 320, 3, 1},  {2, 64, 640, 320, 3, 1},
                                      {2, 32, 640, 640, 3, 1},  {2, 32, 1280, 640, 3, 1},
                                      {2, 16, 1280, 1280, 3, 1}, {2, 16, 2560, 1280, 3, 1},
                                      {2, 8, 1280, 1280, 3, 1}, {2, 8, 2560, 1280, 3, 1},
                                      {2, 64, 320, 320, 3, 2},  {2, 64, 4, 320, 3, 1},
                                      {2, 64, 320, 4, 3, 1},    {2, 64, 960, 320, 1, 1},
                                      {1, 64, 512, 512, 3, 1},  {1, 128, 512, 512, 3, 1},
                                      {1, 256, 256, 256, 3, 1}, {1, 256, 128, 128, 3, 1},
                                      {1, 256, 128, 3, 3, 1}};
    for (size_t i = 0; i < AC_ARRAY_LEN(real); i++) {
        const int32_t *s = real[i], pad = s[4] / 2;
        check_case *c = CASE(list, AC_OP_CONV2D, AC_SHAPE(s[0], s[1], s[1], s[2]),
                             AC_SHAPE(s[3], s[2], s[4], s[4]), AC_SHAPE(s[3]));
        c->attr.conv2d = (ac_conv2d_attr){s[5], pad, pad, pad, pad, AC_ACT_NONE};
        c->real = true;
    }
}

static void
up_conv_cases(case_list *list)
{
    static const int32_t small[][5] = {
        {1, 1, 1, 3, 5}, {2, 5, 7, 4, 33}, {1, 9, 8, 17, 16}, {1, 16, 15, 64, 48}};
    for (size_t i = 0; i < AC_ARRAY_LEN(small); i++) {
        const int32_t *s = small[i];
        for (int variant = 0; variant < 3; variant++) {
            check_case *c = CASE(list, AC_OP_UP_CONV2D, AC_SHAPE(s[0], s[1], s[2], s[3]),
                                 AC_SHAPE(4, s[4], s[3], 2, 2), AC_SHAPE(s[4]),
                                 AC_SHAPE(s[0], 2 * s[1], 2 * s[2], s[4]));
            c->attr.up_conv2d.act = (ac_act)((i + variant) % AC_ACT_COUNT);
            c->shape[AC_CONV_RESIDUAL] = variant == 1 ? c->shape[AC_CONV_RESIDUAL] : absent;
            c->shape[AC_CONV_B] = variant == 0 ? absent : c->shape[AC_CONV_B];
            c->strided = variant == 2;
        }
    }
}

/* ---- attention and norms --------------------------------------------------------------------- */

static void
attention_cases(case_list *list)
{
    /* batch, queries, keys, heads, head size */
    static const int32_t small[][5] = {{1, 1, 1, 1, 8},     {2, 7, 9, 3, 5},    {1, 33, 77, 2, 40},
                                       {2, 65, 65, 2, 64},  {1, 20, 300, 1, 80}, {3, 77, 77, 4, 16},
                                       {1, 40, 70, 1, 512}, {1, 100, 30, 2, 160},
                                       {1, 130, 260, 2, 24}};
    for (size_t i = 0; i < AC_ARRAY_LEN(small); i++) {
        const int32_t *s = small[i];
        int64_t c = s[3] * s[4];
        for (int variant = 0; variant < 4; variant++) {
            bool causal = variant == 2;
            int64_t keys = causal ? s[1] : s[2];
            check_case *k = CASE(list, AC_OP_ATTENTION, AC_SHAPE(s[0], s[1], c),
                                 AC_SHAPE(s[0], keys, c), AC_SHAPE(s[0], keys, c),
                                 AC_SHAPE(s[0], keys));
            k->shape[AC_ATTN_MASK] = variant == 1 ? k->shape[AC_ATTN_MASK] : absent;
            k->attr.attention = (ac_attention_attr){
                .heads = s[3], .scale = (float)(1.0 / sqrt(s[4])), .causal = causal};
            k->strided = variant == 3;
        }
    }
    static const int32_t real[][5] = {{2, 4096, 4096, 8, 40}, {2, 1024, 1024, 8, 80},
                                      {2, 256, 256, 8, 160},  {2, 64, 64, 8, 160},
                                      {2, 4096, 77, 8, 40},   {2, 1024, 77, 8, 80},
                                      {2, 256, 77, 8, 160},   {2, 77, 77, 12, 64},
                                      {1, 4096, 4096, 1, 512}, {2, 1024, 1024, 20, 64}};
    for (size_t i = 0; i < AC_ARRAY_LEN(real); i++) {
        const int32_t *s = real[i];
        int64_t c = s[3] * s[4];
        check_case *k = CASE(list, AC_OP_ATTENTION, AC_SHAPE(s[0], s[1], c),
                             AC_SHAPE(s[0], s[2], c), AC_SHAPE(s[0], s[2], c));
        k->attr.attention =
            (ac_attention_attr){.heads = s[3], .scale = (float)(1.0 / sqrt(s[4]))};
        k->real = true;
    }
}

/* batch, height, width, channels, groups, channels of x2; plain, SiLU, shifted, and with gaps */
static void
group_norm_cases(case_list *list, const int32_t *s, int32_t exponent)
{
    int64_t c = s[3] + s[5];
    for (int variant = 0; variant < 4; variant++) {
        check_case *k = CASE(list, AC_OP_GROUP_NORM, AC_SHAPE(s[0], s[1], s[2], s[3]), AC_SHAPE(c),
                             AC_SHAPE(c), s[5] ? AC_SHAPE(s[0], s[1], s[2], s[5]) : absent, absent);
        k->attr.group_norm = (ac_group_norm_attr){
            .groups = s[4], .eps = 1e-5f, .act = variant & 1 ? AC_ACT_SILU : AC_ACT_NONE,
            .exponent = exponent};
        if (variant >= 2) {
            k->shape[AC_GN_SHIFT] = AC_SHAPE(variant == 2 ? 1 : s[0], c);
        }
        k->strided = variant == 3;
    }
}

/* batch, height and width, channels, those of x2 */
static check_case *
real_group_norm(case_list *list, const int32_t *s)
{
    int64_t c = s[2] + s[3];
    check_case *k = CASE(list, AC_OP_GROUP_NORM, AC_SHAPE(s[0], s[1], s[1], s[2]), AC_SHAPE(c),
                         AC_SHAPE(c), s[3] ? AC_SHAPE(s[0], s[1], s[1], s[3]) : absent, absent);
    k->attr.group_norm = (ac_group_norm_attr){.groups = 32, .eps = 1e-5f, .act = AC_ACT_SILU};
    k->real = true;
    return k;
}

static check_case *
layer_norm_case(case_list *list, int64_t rows, int64_t columns)
{
    check_case *k = CASE(list, AC_OP_LAYER_NORM, AC_SHAPE(1, rows, columns), AC_SHAPE(columns),
                         AC_SHAPE(columns));
    k->attr.layer_norm.eps = 1e-5f;
    return k;
}

static void
norm_cases(case_list *list)
{
    static const int32_t small[][6] = {{1, 1, 1, 4, 2, 0},    {2, 5, 7, 32, 32, 0},
                                       {3, 6, 5, 40, 8, 8},   {1, 9, 9, 35, 5, 10},
                                       {2, 16, 16, 64, 32, 0}, {1, 33, 31, 24, 4, 24},
                                       {2, 4, 4, 17, 1, 0},   {1, 8, 8, 320, 32, 320}};
    for (size_t i = 0; i < AC_ARRAY_LEN(small); i++) {
        group_norm_cases(list, small[i], i == 0 ? -5 : i == 1 ? 3 : 0);
    }
    static const int32_t real[][4] = {{2, 64, 320, 0}, {2, 64, 320, 320}, {2, 32, 640, 0},
                                      {2, 16, 1280, 1280}, {1, 256, 256, 0}, {1, 256, 128, 0}};
    for (size_t i = 0; i < AC_ARRAY_LEN(real); i++) {
        const int32_t *s = real[i];
        real_group_norm(list, s)->shape[AC_GN_SHIFT] = AC_SHAPE(s[0], s[2] + s[3]);
    }
    static const int64_t layers[][2] = {{1, 1},  {3, 7},     {5, 33},    {16, 64},
                                        {9, 771}, {154, 768}, {8192, 320}, {512, 1280}};
    for (size_t i = 0; i < AC_ARRAY_LEN(layers); i++) {
        check_case *k = layer_norm_case(list, layers[i][0], layers[i][1]);
        k->strided = i & 1;
        k->real = layers[i][0] > 1000;
    }
}

/* ---- everything else ------------------------------------------------------------------------- */

static void
elementwise_cases(case_list *list)
{
    static const ac_shape shapes[] = {
        {1, {37}}, {2, {3, 40}}, {3, {2, 19, 66}}, {4, {2, 5, 3, 130}}};
    for (size_t i = 0; i < AC_ARRAY_LEN(shapes); i++) {
        ac_shape s = shapes[i], half = s, vector = AC_SHAPE(s.dim[0], s.dim[s.rank - 1]);
        half.dim[s.rank - 1] *= 2;
        for (int act = 0; act < AC_ACT_COUNT; act++) {
            CASE(list, AC_OP_ACTIVATION, s)->attr.activation.act = (ac_act)act;
            check_case *c = CASE(list, AC_OP_GATE, half);
            c->attr.activation.act = (ac_act)act;
            c->strided = act & 1;
        }
        check_case *c = CASE(list, AC_OP_SCALE, s);
        c->attr.scale = (ac_scale_attr){0.18215f, -0.5f};
        c = CASE(list, AC_OP_ADD, s, s);
        c->strided = i & 1;
        if (s.rank > 1) {
            CASE(list, AC_OP_ADD, s, vector);
            vector.dim[0] = 1;
            CASE(list, AC_OP_ADD, s, vector)->strided = true;
        }
        c = CASE(list, AC_OP_FILL, absent);
        c->n_inputs = 0;
        c->wanted = s;
        c->attr.fill.value = 1.25f;
        for (int32_t axis = 0; axis < s.rank; axis++) {
            ac_shape other = s;
            other.dim[axis] += 3;
            c = CASE(list, AC_OP_CONCAT, s, other, s);
            c->attr.axis.axis = axis;
            c->strided = axis & 1;
        }
        static const ac_dtype floats[] = {AC_F32, AC_F16, AC_BF16, AC_F64};
        for (int from = 0; from < 4; from++) {
            for (int to = 0; to < 4; to++) {
                c = CASE(list, AC_OP_CAST, s);
                c->dtype[0] = floats[from];
                c->out_dtype = floats[to];
            }
        }
    }
    check_case *c = CASE(list, AC_OP_GATE, AC_SHAPE(2, 4096, 2560));
    c->attr.activation.act = AC_ACT_GELU;
    c->real = true;
    c = CASE(list, AC_OP_ACTIVATION, AC_SHAPE(2, 4096, 320));
    c->attr.activation.act = AC_ACT_SILU;
    c->real = true;
    CASE(list, AC_OP_ADD, AC_SHAPE(2, 64, 64, 320), AC_SHAPE(2, 64, 64, 320))->real = true;
    check_case *joined =
        CASE(list, AC_OP_CONCAT, AC_SHAPE(2, 64, 64, 320), AC_SHAPE(2, 64, 64, 320));
    joined->attr.axis.axis = 3;
}

static void
image_cases(case_list *list)
{
    static const int64_t to[][2] = {{10, 14}, {9, 13}, {5, 7}, {7, 20}, {3, 2}};
    for (size_t i = 0; i < AC_ARRAY_LEN(to); i++) {
        check_case *c = CASE(list, AC_OP_UPSAMPLE, AC_SHAPE(2, 5, 7, 19));
        c->wanted = AC_SHAPE(2, to[i][0], to[i][1], 19);
        c->strided = i & 1;
    }
    static const ac_shape images[] = {{4, {1, 1, 1, 1}}, {4, {2, 4, 9, 7}}, {4, {1, 33, 17, 18}},
                                      {4, {2, 3, 40, 33}}};
    for (size_t i = 0; i < AC_ARRAY_LEN(images); i++) {
        for (int dtype = AC_F32; dtype <= AC_F64; dtype++) {
            check_case *c = CASE(list, AC_OP_TO_NHWC, images[i]);
            c->dtype[0] = (ac_dtype)dtype;
            c->strided = dtype & 1;
            c = CASE(list, AC_OP_TO_NCHW, images[i]);
            c->out_dtype = (ac_dtype)dtype;
        }
    }
    CASE(list, AC_OP_PHASE_WEIGHT, AC_SHAPE(5, 7, 3, 3));
    CASE(list, AC_OP_PHASE_WEIGHT, AC_SHAPE(40, 33, 3, 3));
    for (int i = 0; i < 4; i++) {
        check_case *c = CASE(list, AC_OP_TIMESTEP, AC_SHAPE(3));
        c->attr.timestep = (ac_timestep_attr){
            .channels = i == 3 ? 33 : 320, .flip_sin_to_cos = i & 1, .freq_shift = i == 2};
    }
    ac_dtype ids[] = {AC_I64, AC_I32};
    for (int i = 0; i < 2; i++) {
        check_case *c = CASE(list, AC_OP_EMBED, AC_SHAPE(2, 11), AC_SHAPE(29, 70));
        c->dtype[0] = ids[i];
        c->id_limit = 29;
        c = CASE(list, AC_OP_SELECT, AC_SHAPE(6, 3, 50), AC_SHAPE(1));
        c->dtype[1] = ids[i];
        c->id_limit = 6;
        c = CASE(list, AC_OP_EOS_POOL, AC_SHAPE(3, 9, 40), AC_SHAPE(3, 9));
        c->dtype[1] = ids[i];
        c->id_limit = 9;
        c->attr.eos_pool.eos_id = i ? 2 : 7;
    }
}

static void
all_cases(case_list *list)
{
    linear_cases(list);
    conv_cases(list);
    up_conv_cases(list);
    attention_cases(list);
    norm_cases(list);
    elementwise_cases(list);
    image_cases(list);
}

#endif
