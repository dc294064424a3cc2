/* passes: the list, in order, and the loop that runs it. */
#include "edit.h"

#include <string.h>

/* Why this order:
 *   simplify        first, so that no later pattern has to look through what does nothing;
 *   cse             before merging: every resnet computes silu(temb) anew, and only one shared
 *                   input makes their projections mergeable;
 *   merge_linears   before fuse_epilogue, which may give members different epilogues;
 *   phase_upsample  before fuse_epilogue, so that the new convolution gets an epilogue too;
 *   fuse_norm       before fuse_epilogue: it makes concats into second operands, and an added time
 *                   embedding belongs to the norm, not to the convolution before it;
 *   fuse_epilogue   when all GEMMs and convolutions are there;
 *   rescale         last: the scale then enters with what group norms write anyway. */
const ac_pass *const ac_passes[] = {
    &ac_pass_simplify,       &ac_pass_cse,       &ac_pass_merge_linears,
    &ac_pass_phase_upsample, &ac_pass_fuse_norm, &ac_pass_fuse_epilogue,
    &ac_pass_rescale,        NULL,
};

_Static_assert(AC_ARRAY_LEN(ac_passes) <= 33, "one bit of a uint32_t a pass");

static void
dump(const ac_graph *g, const char *pass, const char *why, bool first, const ac_dumps *dumps)
{
    if (!dumps) {
        return;
    }
    if (!dumps->json) {
        ac_text_printf(dumps->text, "== %s: %s (%d nodes)\n", pass, why, g->n_nodes);
        ac_graph_dump(g, dumps->text);
        return;
    }
    ac_text_printf(dumps->text, "%s\n{\"pass\":", first ? "" : ",");
    ac_text_json_string(dumps->text, pass);
    ac_text_printf(dumps->text, ",\"why\":");
    ac_text_json_string(dumps->text, why);
    ac_text_printf(dumps->text, ",\"graph\":");
    ac_graph_json(g, dumps->text);
    ac_text_printf(dumps->text, "}");
}

ac_status
ac_passes_run(ac_graph *g, uint32_t off, const ac_dumps *dumps)
{
    AC_TRY(ac_graph_sort(g));
    dump(g, "built", "what the model says", true, dumps);
    for (int32_t i = 0; ac_passes[i]; i++) {
        if (off >> i & 1) {
            continue;
        }
        ac_status status = ac_passes[i]->run(g);
        status = status < 0 ? status : ac_graph_sort(g);
        status = status < 0 ? status : ac_graph_verify(g); /* 0.1 ms for SDXL */
        if (status < 0) {
            return ac_error_prefix(status, "pass %s", ac_passes[i]->name);
        }
        dump(g, ac_passes[i]->name, ac_passes[i]->why, false, dumps);
    }
    return AC_OK;
}

/* Index of the pass with this name, or the number of passes. */
static int32_t
find_pass(const char *name, size_t length)
{
    int32_t i = 0;
    while (ac_passes[i] && (strlen(ac_passes[i]->name) != length ||
                            memcmp(ac_passes[i]->name, name, length) != 0)) {
        i++;
    }
    return i;
}

static ac_status
unknown_pass(const char *name, size_t length)
{
    char known[512] = "";
    size_t used = 0;
    for (int32_t i = 0; ac_passes[i]; i++) {
        size_t more = strlen(ac_passes[i]->name);
        if (used + more + 2 < sizeof known) {
            memcpy(known + used, ac_passes[i]->name, more);
            memcpy(known + used + more, ", ", 3);
            used += more + 2;
        }
    }
    return ac_error(AC_E_INVALID, "passes off: found \"%.*s\", expected some of %sor all",
                    (int)AC_MIN(length, 64), name, known);
}

ac_status
ac_passes_off_from_text(const char *text, uint32_t *off)
{
    uint32_t mask = 0;
    for (const char *c = text ? text : ""; *c;) {
        size_t length = strcspn(c, ",");
        int32_t i = find_pass(c, length);
        if (length == 3 && memcmp(c, "all", 3) == 0) {
            mask = (uint32_t)((UINT64_C(1) << (AC_ARRAY_LEN(ac_passes) - 1)) - 1);
        } else if (ac_passes[i]) {
            mask |= UINT32_C(1) << i;
        } else {
            return unknown_pass(c, length);
        }
        c += length;
        c += *c == ',';
    }
    *off = mask;
    return AC_OK;
}
