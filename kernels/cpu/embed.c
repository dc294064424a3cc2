/* embed: y[..., :] = table[ids[...], :]. */
#include "plain.h"

/* The i-th id in row-major order. */
static int64_t
id_at(const ac_tensor *ids, int64_t i)
{
    int64_t columns = ac_plain_columns(ids);
    int64_t at = ac_plain_row(ids, i / columns) + i % columns * ac_plain_column_stride(ids);
    return (int64_t)ac_element_get(ids->data, ids->dtype, at);
}

static void
rows_of(const ac_problem *p, int64_t first, int64_t rows)
{
    const ac_tensor *ids = &p->input[0], *table = &p->input[1], *out = &p->output;
    int64_t columns = ac_plain_columns(out), stride = ac_plain_column_stride(out);
    double line[AC_PLAIN_CHUNK];
    for (int64_t row = first; row < first + rows; row++) {
        int64_t id = id_at(ids, row);
        for (int64_t c = 0; c < columns; c += AC_PLAIN_CHUNK) {
            int64_t count = AC_MIN(columns - c, AC_PLAIN_CHUNK);
            ac_plain_load_pair(line, table, NULL, id, c, count);
            ac_plain_store(line, out, ac_plain_row(out, row) + c * stride, stride, count);
        }
    }
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *scratch, const void *prepared)
{
    (void)scratch;
    (void)prepared;
    int64_t limit = p->input[1].shape.dim[0], count = ac_tensor_count(&p->input[0]);
    for (int64_t i = 0; i < count; i++) {
        int64_t id = id_at(&p->input[0], i);
        if (id < 0 || id >= limit) {
            return ac_error(AC_E_INVALID, "ids: found %lld, expected 0 to %lld", (long long)id,
                            (long long)limit - 1);
        }
    }
    ac_plain_over_rows(lane, p, &p->output, rows_of);
    return AC_OK;
}

const ac_kernel ac_cpu_embed_plain = {
    .name = "cpu.embed.plain",
    .op = AC_OP_EMBED,
    .supports = ac_plain_supports,
    .launch = launch,
};
