/* cublaslt_conv: see blas_conv.h. */
#include "blas.h"
#include "blas_conv.h"

#define GATHERED_BYTES ((size_t)96 << 20) /* of gathered rows in scratch at once */

static int64_t
row_of(const ac_blas_conv *c)
{
    return c->kernel_h * c->kernel_w * c->c_in;
}

static bool
is_rows_already(const ac_blas_conv *c)
{
    return c->kernel_h == 1 && c->kernel_w == 1 && c->stride == 1 && c->pad_top == 0 &&
           c->pad_left == 0 && c->out_height == c->height && c->out_width == c->width;
}

static int64_t
rows_at_once(const ac_blas_conv *c)
{
    int64_t all = c->images * c->out_height * c->out_width;
    int64_t bytes = row_of(c) * (int64_t)ac_dtype_size(c->dtype);
    int64_t most = is_rows_already(c) ? INT32_MAX / AC_MAX(c->c_in, c->c_out)
                                      : (int64_t)GATHERED_BYTES / bytes;
    return AC_MIN(ac_blas_even_rows(all, most, 1), all);
}

bool
ac_blas_conv_fits(const ac_blas_conv *c)
{
    int64_t unit = 16 / (int64_t)ac_dtype_size(c->dtype);
    bool channels = c->c_in % unit == 0 && (c->dtype == AC_F32 || c->c_out % unit == 0);
    return channels && row_of(c) <= INT32_MAX / 128 && c->c_out <= INT32_MAX / 128 &&
           c->height * c->width <= INT32_MAX && ac_blas_found();
}

size_t
ac_blas_conv_scratch(const ac_blas_conv *c)
{
    size_t gathered = (size_t)(rows_at_once(c) * row_of(c)) * ac_dtype_size(c->dtype);
    return AC_BLAS_WORKSPACE + (is_rows_already(c) ? 0 : ac_align_up(gathered, 256));
}

static ac_status
run_rows(ac_blas_call *call, const ac_blas_conv *c, int64_t first, int64_t count)
{
    ac_blas_key key = {.m = count, .n = c->c_out, .k = row_of(c), .x_row = row_of(c),
                       .w_row = row_of(c), .out_row = c->c_out,
                       .residual_row = c->residual ? c->c_out : 0, .dtype = c->dtype,
                       .out_dtype = c->dtype, .bias = c->bias != NULL,
                       .residual = c->residual != NULL, .tf32 = c->tf32};
    if (is_rows_already(c)) {
        call->x = ac_cuda_at(c->x, first * c->c_in, c->dtype);
    } else {
        char *gathered = (char *)call->workspace + AC_BLAS_WORKSPACE;
        AC_TRY(ac_cuda_gather(call->lane, c, first, count, gathered));
        call->x = gathered;
    }
    call->out = (void *)ac_cuda_at(c->out, first * c->c_out, c->dtype);
    call->residual = ac_cuda_at(c->residual, first * c->c_out, c->dtype);
    return ac_blas_multiply(call, &key);
}

ac_status
ac_blas_conv_run(ac_lane *lane, const ac_blas_conv *c, void *scratch)
{
    ac_blas_call call = {.lane = lane, .libraries = *ac_cuda_libraries_slot(lane),
                         .weight = c->weight, .bias = c->bias, .workspace = scratch,
                         .factor = 1.0f};
    int64_t all = c->images * c->out_height * c->out_width, step = rows_at_once(c);
    AC_TRY(ac_blas_open(call.libraries));
    for (int64_t first = 0; first < all; first += step) {
        AC_TRY(run_rows(&call, c, first, AC_MIN(step, all - first)));
    }
    return AC_OK;
}
