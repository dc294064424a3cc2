/* conv2d: y = act(conv([x|x2], w) + b) + residual, NHWC, w [c_out, c_in, kh, kw], zero padding.
 *
 * Plain: a tile is 16 pixels of a row by 64 output channels.  The pixels' patches are gathered
 * into scratch in the order of w's rows, so each output is one dot product.
 */
#include "plain.h"

#include <string.h>

#define PIXELS 16
#define CHANNELS 64

typedef struct job {
    const ac_problem *p;
    int64_t k; /* c_in kh kw */
    int64_t pixel_tiles, channel_tiles;
} job;

/* One pixel's patch, [c_in][kh][kw]; `line` holds c_in doubles. */
static void
gather(const ac_problem *p, int64_t image, int64_t y, int64_t x, double *patch, double *line)
{
    const ac_conv2d_attr *attr = &p->attr.conv2d;
    const ac_tensor *in = &p->input[0], *w = &p->input[AC_CONV_W];
    int64_t c_in = w->shape.dim[1], kh = w->shape.dim[2], kw = w->shape.dim[3];
    int64_t height = in->shape.dim[1], width = in->shape.dim[2];
    for (int64_t ky = 0; ky < kh; ky++) {
        for (int64_t kx = 0; kx < kw; kx++) {
            int64_t iy = y * attr->stride - attr->pad_top + ky;
            int64_t ix = x * attr->stride - attr->pad_left + kx;
            if (iy >= 0 && iy < height && ix >= 0 && ix < width) {
                ac_plain_load_pair(line, in, ac_operand(p, AC_CONV_X2),
                                   (image * height + iy) * width + ix, 0, c_in);
            } else {
                memset(line, 0, sizeof *line * (size_t)c_in);
            }
            for (int64_t c = 0; c < c_in; c++) {
                patch[(c * kh + ky) * kw + kx] = line[c];
            }
        }
    }
}

/* Row o of w as c_in kh kw doubles. */
static void
load_filter(double *to, const ac_tensor *w, int64_t o)
{
    int64_t c_in = w->shape.dim[1], kh = w->shape.dim[2], kw = w->shape.dim[3];
    for (int64_t c = 0; c < c_in; c++) {
        for (int64_t ky = 0; ky < kh; ky++) {
            ac_plain_load(to, w, o * w->stride[0] + c * w->stride[1] + ky * w->stride[2],
                          w->stride[3], kw);
            to += kw;
        }
    }
}

static void
tile(void *arg, int64_t index, void *scratch)
{
    const job *j = arg;
    const ac_problem *p = j->p;
    const ac_tensor *out = &p->output, *b = ac_operand(p, AC_CONV_B);
    const ac_tensor *residual = ac_operand(p, AC_CONV_RESIDUAL);
    int64_t o0 = index % j->channel_tiles * CHANNELS, o1 = AC_MIN(o0 + CHANNELS, out->shape.dim[3]);
    index /= j->channel_tiles;
    int64_t x0 = index % j->pixel_tiles * PIXELS, pixels = AC_MIN(out->shape.dim[2] - x0, PIXELS);
    int64_t y = index / j->pixel_tiles % out->shape.dim[1];
    int64_t image = index / j->pixel_tiles / out->shape.dim[1];
    int64_t row0 = (image * out->shape.dim[1] + y) * out->shape.dim[2] + x0;
    double *patches = scratch, *line = patches + PIXELS * j->k, sums[PIXELS];
    for (int64_t i = 0; i < pixels; i++) {
        gather(p, image, y, x0 + i, patches + i * j->k, line);
    }
    for (int64_t o = o0; o < o1; o++) {
        double bias = b ? ac_element_get(b->data, b->dtype, o * b->stride[0]) : 0.0;
        load_filter(line, &p->input[AC_CONV_W], o);
        ac_plain_dots(sums, patches, j->k, pixels, line, j->k);
        for (int64_t i = 0; i < pixels; i++) {
            double value = ac_plain_act(p->attr.conv2d.act, sums[i] + bias);
            if (residual) {
                value += ac_element_get(residual->data, residual->dtype,
                                        ac_plain_row(residual, row0 + i) + o * residual->stride[3]);
            }
            ac_element_set(out->data, out->dtype, ac_plain_row(out, row0 + i) + o * out->stride[3],
                           value);
        }
    }
}

static int64_t
filter_length(const ac_problem *p)
{
    const ac_shape *w = &p->input[AC_CONV_W].shape;
    return w->dim[1] * w->dim[2] * w->dim[3];
}

static size_t
worker_scratch(const ac_problem *p, const ac_caps *caps)
{
    (void)caps;
    return sizeof(double) * (size_t)filter_length(p) * (PIXELS + 1);
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *scratch, const void *prepared)
{
    (void)scratch;
    (void)prepared;
    const int64_t *dim = p->output.shape.dim;
    job j = {.p = p,
             .k = filter_length(p),
             .pixel_tiles = (dim[2] + PIXELS - 1) / PIXELS,
             .channel_tiles = (dim[3] + CHANNELS - 1) / CHANNELS};
    ac_pool_run(lane, dim[0] * dim[1] * j.pixel_tiles * j.channel_tiles, tile, &j);
    return AC_OK;
}

const ac_kernel ac_cpu_conv2d_plain = {
    .name = "cpu.conv2d.plain",
    .op = AC_OP_CONV2D,
    .supports = ac_plain_supports,
    .worker_scratch = worker_scratch,
    .launch = launch,
};
