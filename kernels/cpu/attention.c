/* attention: y = softmax(q k^T scale + mask) v, heads side by side in the columns.
 *
 * Plain: a tile is 8 queries of one head; all their scores lie in scratch.
 */
#include "plain.h"

#include <math.h>
#include <string.h>

#define QUERIES 8

typedef struct job {
    const ac_problem *p;
    int64_t tq, tk, d, query_tiles;
} job;

/* Columns of head `head` of one token. */
static void
load_head(double *to, const ac_tensor *t, int64_t row, int64_t head, int64_t d)
{
    ac_plain_load_pair(to, t, NULL, row, head * d, d);
}

/* exp(score - max) in place, over the keys that count; returns their sum. */
static double
softmax(double *score, int64_t keys, int64_t step)
{
    double most = -INFINITY, sum = 0.0;
    for (int64_t i = 0; i < keys; i++) {
        most = fmax(most, score[i * step]);
    }
    for (int64_t i = 0; i < keys; i++) {
        score[i * step] = exp(score[i * step] - most);
        sum += score[i * step];
    }
    return sum;
}

static void
tile(void *arg, int64_t index, void *scratch)
{
    const job *j = arg;
    const ac_problem *p = j->p;
    const ac_attention_attr *attr = &p->attr.attention;
    const ac_tensor *mask = ac_operand(p, AC_ATTN_MASK), *out = &p->output;
    int64_t first = index % j->query_tiles * QUERIES, queries = AC_MIN(j->tq - first, QUERIES);
    int64_t head = index / j->query_tiles % attr->heads;
    int64_t image = index / j->query_tiles / attr->heads;
    double *q = scratch, *acc = q + QUERIES * j->d, *line = acc + QUERIES * j->d;
    double *score = line + j->d, sum[QUERIES]; /* score [tk][QUERIES] */
    for (int64_t i = 0; i < queries; i++) {
        load_head(q + i * j->d, &p->input[AC_ATTN_Q], image * j->tq + first + i, head, j->d);
    }
    for (int64_t t = 0; t < j->tk; t++) {
        load_head(line, &p->input[AC_ATTN_K], image * j->tk + t, head, j->d);
        ac_plain_dots(score + t * QUERIES, q, j->d, queries, line, j->d);
        double add = mask ? ac_element_get(mask->data, mask->dtype,
                                           image * mask->stride[0] + t * mask->stride[1])
                          : 0.0;
        for (int64_t i = 0; i < queries; i++) {
            score[t * QUERIES + i] = score[t * QUERIES + i] * (double)attr->scale + add;
        }
    }
    memset(acc, 0, sizeof *acc * (size_t)(QUERIES * j->d));
    for (int64_t i = 0; i < queries; i++) {
        sum[i] = softmax(score + i, attr->causal ? first + i + 1 : j->tk, QUERIES);
    }
    for (int64_t t = 0; t < j->tk; t++) {
        load_head(line, &p->input[AC_ATTN_V], image * j->tk + t, head, j->d);
        for (int64_t i = attr->causal ? AC_MAX(t - first, 0) : 0; i < queries; i++) {
            for (int64_t c = 0; c < j->d; c++) {
                acc[i * j->d + c] += score[t * QUERIES + i] * line[c];
            }
        }
    }
    for (int64_t i = 0; i < queries; i++) {
        for (int64_t c = 0; c < j->d; c++) {
            acc[i * j->d + c] /= sum[i];
        }
        int64_t stride = ac_plain_column_stride(out);
        int64_t at = ac_plain_row(out, image * j->tq + first + i) + head * j->d * stride;
        ac_plain_store(acc + i * j->d, out, at, stride, j->d);
    }
}

static int64_t
head_size(const ac_problem *p)
{
    return p->output.shape.dim[2] / p->attr.attention.heads;
}

static size_t
worker_scratch(const ac_problem *p, const ac_caps *caps)
{
    (void)caps;
    int64_t tk = p->input[AC_ATTN_K].shape.dim[1];
    return sizeof(double) * (size_t)((2 * QUERIES + 1) * head_size(p) + QUERIES * tk);
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *scratch, const void *prepared)
{
    (void)scratch;
    (void)prepared;
    job j = {.p = p,
             .tq = p->output.shape.dim[1],
             .tk = p->input[AC_ATTN_K].shape.dim[1],
             .d = head_size(p)};
    j.query_tiles = (j.tq + QUERIES - 1) / QUERIES;
    ac_pool_run(lane, p->output.shape.dim[0] * p->attr.attention.heads * j.query_tiles, tile, &j);
    return AC_OK;
}

const ac_kernel ac_cpu_attention_plain = {
    .name = "cpu.attention.plain",
    .op = AC_OP_ATTENTION,
    .supports = ac_plain_supports,
    .worker_scratch = worker_scratch,
    .launch = launch,
};
