/* eos_pool: y[n] = x[n, position of the end token of text n].
 *
 * eos_id 2 stands for old configs that name a wrong token: there the highest id ends the text.  A
 * text without the token takes position 0, as argmax over no match does.
 */
#include "plain.h"

static int64_t
end_of_text(const ac_tensor *ids, int64_t text, int64_t eos_id)
{
    int64_t at = 0, most = INT64_MIN;
    for (int64_t i = 0; i < ids->shape.dim[1]; i++) {
        int64_t id = (int64_t)ac_element_get(ids->data, ids->dtype,
                                             text * ids->stride[0] + i * ids->stride[1]);
        if (eos_id != 2 && id == eos_id) {
            return i;
        }
        if (eos_id == 2 && id > most) {
            most = id;
            at = i;
        }
    }
    return at;
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *scratch, const void *prepared)
{
    (void)scratch;
    (void)prepared;
    int64_t size = (int64_t)ac_dtype_size(p->input[0].dtype);
    for (int64_t i = 0; i < p->output.shape.dim[0]; i++) {
        int64_t at = end_of_text(&p->input[1], i, p->attr.eos_pool.eos_id);
        ac_tensor from = p->input[0], to = p->output;
        from.data = (char *)from.data + (i * from.stride[0] + at * from.stride[1]) * size;
        from.shape = to.shape = AC_SHAPE(to.shape.dim[1]);
        from.stride[0] = from.stride[2];
        to.data = (char *)to.data + i * to.stride[0] * (int64_t)ac_dtype_size(to.dtype);
        to.stride[0] = to.stride[1];
        ac_plain_copy(lane, &to, &from);
    }
    return AC_OK;
}

const ac_kernel ac_cpu_eos_pool_plain = {
    .name = "cpu.eos_pool.plain",
    .op = AC_OP_EOS_POOL,
    .supports = ac_plain_supports,
    .launch = launch,
};
