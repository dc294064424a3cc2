/* up_conv2d: 3x3 convolution of the nearest-2x enlarged image, as four 2x2 convolutions.
 *
 *     y[2i + a, 2j + b] = act(sum over t, u of w[2a + b][., ., t, u] x[i-1 + a + t, j-1 + b + u]
 *                             + bias) + residual                 a, b, t, u in {0, 1}
 *
 * Plain: a tile is one output row by 64 output channels; pixels of one parity share the filter.
 */
#include "plain.h"

#include <string.h>

#define CHANNELS 64
#define PIXELS 16 /* gathered at a time */

typedef struct job {
    const ac_problem *p;
    int64_t c_in, channel_tiles;
} job;

/* The 2x2 patch under output pixel (y, x), in the order of a filter's elements: [c_in][2][2]. */
static void
gather(const ac_tensor *in, int64_t image, int64_t y, int64_t x, double *patch, double *line)
{
    int64_t height = in->shape.dim[1], width = in->shape.dim[2], c_in = in->shape.dim[3];
    for (int64_t tap = 0; tap < 4; tap++) {
        int64_t iy = y / 2 - 1 + y % 2 + tap / 2, ix = x / 2 - 1 + x % 2 + tap % 2;
        if (iy >= 0 && iy < height && ix >= 0 && ix < width) {
            ac_plain_load_pair(line, in, NULL, (image * height + iy) * width + ix, 0, c_in);
        } else {
            memset(line, 0, sizeof *line * (size_t)c_in);
        }
        for (int64_t c = 0; c < c_in; c++) {
            patch[4 * c + tap] = line[c];
        }
    }
}

static void
load_filter(double *to, const ac_tensor *w, int64_t phase, int64_t o)
{
    for (int64_t c = 0; c < w->shape.dim[2]; c++) {
        for (int64_t t = 0; t < 2; t++, to += 2) {
            ac_plain_load(to, w,
                          phase * w->stride[0] + o * w->stride[1] + c * w->stride[2] +
                              t * w->stride[3],
                          w->stride[4], 2);
        }
    }
}

/* Output pixels x0, x0 + 2, ... of one row: same phase, same filters. */
static void
block(const job *j, int64_t image, int64_t y, int64_t x0, int64_t pixels, int64_t o0, int64_t o1,
      double *scratch)
{
    const ac_problem *p = j->p;
    const ac_tensor *out = &p->output, *b = ac_operand(p, AC_CONV_B);
    const ac_tensor *residual = ac_operand(p, AC_CONV_RESIDUAL);
    int64_t k = 4 * j->c_in, row0 = (image * out->shape.dim[1] + y) * out->shape.dim[2] + x0;
    double *patches = scratch, *line = patches + PIXELS * k, sums[PIXELS];
    for (int64_t i = 0; i < pixels; i++) {
        gather(&p->input[0], image, y, x0 + 2 * i, patches + i * k, line);
    }
    for (int64_t o = o0; o < o1; o++) {
        double bias = b ? ac_element_get(b->data, b->dtype, o * b->stride[0]) : 0.0;
        load_filter(line, &p->input[AC_CONV_W], 2 * (y % 2) + x0 % 2, o);
        ac_plain_dots(sums, patches, k, pixels, line, k);
        for (int64_t i = 0; i < pixels; i++) {
            double value = ac_plain_act(p->attr.up_conv2d.act, sums[i] + bias);
            int64_t row = row0 + 2 * i;
            if (residual) {
                value += ac_element_get(residual->data, residual->dtype,
                                        ac_plain_row(residual, row) + o * residual->stride[3]);
            }
            ac_element_set(out->data, out->dtype, ac_plain_row(out, row) + o * out->stride[3],
                           value);
        }
    }
}

static void
tile(void *arg, int64_t index, void *scratch)
{
    const job *j = arg;
    const int64_t *dim = j->p->output.shape.dim;
    int64_t o0 = index % j->channel_tiles * CHANNELS, o1 = AC_MIN(o0 + CHANNELS, dim[3]);
    int64_t y = index / j->channel_tiles % dim[1], image = index / j->channel_tiles / dim[1];
    for (int64_t x = 0; x < dim[2] / 2; x += PIXELS) {
        int64_t pixels = AC_MIN(dim[2] / 2 - x, PIXELS);
        block(j, image, y, 2 * x, pixels, o0, o1, scratch);
        block(j, image, y, 2 * x + 1, pixels, o0, o1, scratch);
    }
}

static size_t
worker_scratch(const ac_problem *p, const ac_caps *caps)
{
    (void)caps;
    return sizeof(double) * 4 * (size_t)p->input[0].shape.dim[3] * (PIXELS + 1);
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *scratch, const void *prepared)
{
    (void)scratch;
    (void)prepared;
    const int64_t *dim = p->output.shape.dim;
    job j = {.p = p,
             .c_in = p->input[0].shape.dim[3],
             .channel_tiles = (dim[3] + CHANNELS - 1) / CHANNELS};
    ac_pool_run(lane, dim[0] * dim[1] * j.channel_tiles, tile, &j);
    return AC_OK;
}

const ac_kernel ac_cpu_up_conv2d_plain = {
    .name = "cpu.up_conv2d.plain",
    .op = AC_OP_UP_CONV2D,
    .supports = ac_plain_supports,
    .worker_scratch = worker_scratch,
    .launch = launch,
};
