/* group_norm: y = act((v - mean) / sqrt(variance + eps) gamma + beta) 2^exponent,
 * v = [x|x2] + shift[n, c].
 *
 * Statistics over the pixels and channels of a group.  Plain: a tile is one group of one image;
 * mean first, then the squares of what is left, so a large mean costs no digits.
 */
#include "plain.h"

#include <math.h>

typedef struct job {
    const ac_problem *p;
    int64_t pixels, channels; /* of a group */
} job;

static double
vector_at(const ac_tensor *t, int64_t i)
{
    return ac_element_get(t->data, t->dtype, i * t->stride[0]);
}

/* The group's channels of one pixel, shifted. */
static void
load(const job *j, int64_t image, int64_t pixel, int64_t c0, const double *shift, double *line)
{
    ac_plain_load_pair(line, &j->p->input[0], ac_operand(j->p, AC_GN_X2),
                       image * j->pixels + pixel, c0, j->channels);
    for (int64_t c = 0; c < j->channels; c++) {
        line[c] += shift[c];
    }
}

static void
tile(void *arg, int64_t index, void *scratch)
{
    const job *j = arg;
    const ac_problem *p = j->p;
    const ac_group_norm_attr *attr = &p->attr.group_norm;
    const ac_tensor *shift = ac_operand(p, AC_GN_SHIFT), *out = &p->output;
    int64_t image = index / attr->groups, c0 = index % attr->groups * j->channels;
    double *line = scratch, *moved = line + j->channels, sum = 0.0, squares = 0.0;
    double count = (double)(j->pixels * j->channels);
    for (int64_t c = 0; c < j->channels; c++) {
        int64_t row = shift && shift->shape.dim[0] > 1 ? image : 0;
        moved[c] = shift ? ac_element_get(shift->data, shift->dtype,
                                          row * shift->stride[0] + (c0 + c) * shift->stride[1])
                         : 0.0;
    }
    for (int64_t i = 0; i < j->pixels; i++) {
        load(j, image, i, c0, moved, line);
        for (int64_t c = 0; c < j->channels; c++) {
            sum += line[c];
        }
    }
    double mean = sum / count;
    for (int64_t i = 0; i < j->pixels; i++) {
        load(j, image, i, c0, moved, line);
        for (int64_t c = 0; c < j->channels; c++) {
            squares += (line[c] - mean) * (line[c] - mean);
        }
    }
    double scale = 1.0 / sqrt(squares / count + (double)attr->eps);
    for (int64_t i = 0; i < j->pixels; i++) {
        load(j, image, i, c0, moved, line);
        for (int64_t c = 0; c < j->channels; c++) {
            double y = (line[c] - mean) * scale * vector_at(&p->input[AC_GN_GAMMA], c0 + c) +
                       vector_at(&p->input[AC_GN_BETA], c0 + c);
            line[c] = ldexp(ac_plain_act(attr->act, y), attr->exponent);
        }
        int64_t stride = ac_plain_column_stride(out);
        ac_plain_store(line, out, ac_plain_row(out, image * j->pixels + i) + c0 * stride, stride,
                       j->channels);
    }
}

static int64_t
group_channels(const ac_problem *p)
{
    return ac_plain_columns(&p->output) / p->attr.group_norm.groups;
}

static size_t
worker_scratch(const ac_problem *p, const ac_caps *caps)
{
    (void)caps;
    return sizeof(double) * 2 * (size_t)group_channels(p);
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *scratch, const void *prepared)
{
    (void)scratch;
    (void)prepared;
    int64_t images = p->output.shape.dim[0];
    job j = {.p = p,
             .pixels = images ? ac_plain_rows(&p->output) / images : 0,
             .channels = group_channels(p)};
    ac_pool_run(lane, images * p->attr.group_norm.groups, tile, &j);
    return AC_OK;
}

const ac_kernel ac_cpu_group_norm_plain = {
    .name = "cpu.group_norm.plain",
    .op = AC_OP_GROUP_NORM,
    .supports = ac_plain_supports,
    .worker_scratch = worker_scratch,
    .launch = launch,
};
