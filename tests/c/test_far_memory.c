/* test_far_memory: weights of a device that are released or borrowed, and no memory. */
#include "far_rig.h"

static request want, got;

/* ---- weights --------------------------------------------------------------------------------- */

static bool
has_derived(const rig *r, const char *key)
{
    for (int32_t i = 0; i < ac_weights_derived_count(r->weights); i++) {
        const ac_derived *d = ac_weights_derived_at(r->weights, i);
        if (d->data && strcmp(d->key, key) == 0) {
            return true;
        }
    }
    return false;
}

/* f16 weights under f32: casts, joins and packed forms stay, what they were made of goes. */
static void
only_what_steps_read_stays(void)
{
    static float expected[COUNT], found[COUNT];
    open_both();
    rig_close(&there);
    rig_close(&cpu);
    for (int dtype = 0; dtype < 2; dtype++) {
        rig_open(&cpu, "cpu", dtype ? AC_F16 : AC_F32);
        rig_open(&there, "far", dtype ? AC_F16 : AC_F32);
        CHECK_OK(call(&cpu, SIZE, (ac_stream){0}, true, expected));
        CHECK_OK(call(&there, SIZE, (ac_stream){0}, true, found));
        CHECK(memcmp(expected, found, sizeof found) == 0);
        CHECK(!has_derived(&there, "upload(mid_block.attentions.0.transformer_blocks.0.attn1"
                                   ".to_q.weight)"));
        CHECK(!has_derived(&there, "upload(mid_block.resnets.0.conv1.weight)"));
        CHECK_INT(has_derived(&there, "upload(mid_block.resnets.0.norm1.weight)"), !dtype);
        for (int32_t i = 0; i < ac_weights_derived_count(there.weights); i++) {
            const ac_derived *d = ac_weights_derived_at(there.weights, i);
            CHECK(strncmp(d->key, "cast", 4) != 0 || !d->data || !strstr(d->key, "conv1.weight"));
        }
        rig_close(&cpu);
        rig_close(&there);
        CHECK_INT(far.live, 0);
    }
}

/* Weights on the device: joined rows one behind the other, filters as [o, h, w, i]. */
static void
lay_out_there(rig *r)
{
    static const char *const joined[] = {"to_q", "to_k", "to_v"};
    char *at;
    size_t total = 0;
    int32_t n = ac_weights_count(r->weights);
    for (int32_t i = 0; i < n; i++) {
        total += ac_align_up(ac_tensor_bytes(ac_weights_find(r->weights,
                                                             ac_weights_name(r->weights, i))),
                             256);
    }
    CHECK_OK(far_alloc(NULL, total, &r->far_block));
    at = r->far_block;
    for (int pass = 0; pass < 2; pass++) {
        for (int32_t i = 0; i < n; i++) {
            const char *name = ac_weights_name(r->weights, i);
            const char *part = strstr(name, "attn1.to_q");
            bool in_join = strstr(name, "attn1.to_q") || strstr(name, "attn1.to_k") ||
                           strstr(name, "attn1.to_v");
            if (pass == 0 ? !part : in_join) {
                continue;
            }
            for (int k = 0; k < (pass ? 1 : 3); k++) {
                char other[256];
                snprintf(other, sizeof other, "%s", name);
                if (pass == 0) {
                    memcpy(other + (part - name) + 6, joined[k], 4);
                }
                ac_tensor t = *ac_weights_find(r->weights, other), to = t;
                to.data = at;
                if (t.shape.rank == 4) {
                    ac_problem p = {.op = AC_OP_CONV2D, .n_inputs = 2,
                                    .input = (ac_tensor[]){t, t}};
                    void *temporary;
                    far_lane lane = {0};
                    CHECK_OK(far_alloc(NULL, ac_tensor_bytes(&t), &temporary));
                    memcpy(temporary, t.data, ac_tensor_bytes(&t));
                    p.input[1].data = temporary;
                    CHECK_OK(far_prepare((ac_lane *)&lane, &p, at));
                    far_free(NULL, temporary);
                    const int64_t *d = t.shape.dim;
                    const int64_t stride[4] = {d[1] * d[2] * d[3], 1, d[3] * d[1], d[1]};
                    memcpy(to.stride, stride, sizeof stride);
                } else {
                    memcpy(at, t.data, ac_tensor_bytes(&t));
                }
                CHECK_OK(ac_weights_set_device(r->weights, other, &to, NULL, NULL));
                at += pass ? ac_align_up(ac_tensor_bytes(&t), 256) : ac_tensor_bytes(&t);
            }
            at = (char *)ac_align_up((size_t)at, 256);
        }
    }
}

static void
laid_out_weights_are_borrowed(void)
{
    static float expected[COUNT], found[COUNT];
    int32_t borrowed[2] = {0};
    open_both();
    lay_out_there(&there);
    CHECK_OK(call(&cpu, SIZE, (ac_stream){0}, true, expected));
    start_count();
    for (int run = 0; run < 4; run++) {
        CHECK_OK(call(&there, SIZE, (ac_stream){0}, true, found));
        CHECK(memcmp(expected, found, sizeof found) == 0);
    }
    CHECK(far.replays > 0);
    for (int32_t i = 0; i < ac_weights_derived_count(there.weights); i++) {
        const ac_derived *d = ac_weights_derived_at(there.weights, i);
        CHECK(strncmp(d->key, "upload", 6) != 0 || !d->data);
        if (d->data && d->borrowed) {
            CHECK_INT(d->bytes, 0);
            borrowed[strncmp(d->key, "ohwi", 4) == 0]++;
        } else if (d->data) {
            CHECK(!strstr(d->key, "attn1.to_q"));
            CHECK(strncmp(d->key, "ohwi", 4) != 0 || strstr(d->key, "phase"));
        }
    }
    CHECK(borrowed[0] >= 3 && borrowed[1] >= 10);
    ac_weights_drop_derived(there.weights);
    CHECK_OK(call(&there, SIZE, (ac_stream){0}, true, found));
    CHECK(memcmp(expected, found, sizeof found) == 0);
    close_both();
}

/* ---- memory ---------------------------------------------------------------------------------- */

/* Whatever allocation fails, nothing stays and the next call works. */
static void
out_of_memory_leaves_nothing(void)
{
    static request other;
    open_both();
    want = (request){.schedule = schedules[5], .guidance = 2.0};
    CHECK_OK(denoise(&cpu, &want));
    int64_t failed = 0;
    for (int64_t nth = 1;; nth++) {
        got = want;
        far.fail_at = nth;
        ac_status status = denoise(&there, &got);
        bool reached = far.fail_at == 0;
        far.fail_at = 0;
        if (!reached) {
            CHECK_OK(status);
            break;
        }
        failed++;
        CHECK_INT(status, AC_E_MEMORY);
        CHECK(strstr(ac_error_message(), "bytes were asked for"));
        CHECK(strstr(ac_error_message(), "this plan takes "));
        CHECK_INT(far.live, 0);
        CHECK_INT(far.recordings, 0);
        if (nth % 7 == 0) {
            got = want;
            CHECK_OK(denoise(&there, &got));
            same_latents(&got, &want);
            ac_model_drop_plans(there.model);
            ac_weights_drop_derived(there.weights);
            CHECK_INT(far.live, 0);
        }
    }
    CHECK(failed > 20);
    /* a larger size fails beside one that works */
    other = (request){.schedule = schedules[5], .guidance = 2.0, .size = 2 * SIZE};
    far.fail_at = 1;
    size_t live = far.live;
    CHECK_INT(denoise(&there, &other), AC_E_MEMORY);
    CHECK(far.live <= live);
    got = want;
    CHECK_OK(denoise(&there, &got));
    same_latents(&got, &want);
    close_both();
}

static void
dropped_memory_comes_back(void)
{
    static float found[COUNT], again[COUNT];
    open_both();
    for (int round = 0; round < 3; round++) {
        CHECK_OK(call(&there, SIZE, (ac_stream){0}, true, round ? again : found));
        CHECK_OK(call(&there, SIZE, (ac_stream){0}, true, again));
        CHECK(memcmp(found, again, sizeof found) == 0);
        CHECK(far.live > 0);
        ac_model_drop_plans(there.model);
        ac_weights_drop_derived(there.weights);
        CHECK_INT(far.live, 0);
        CHECK_INT(far.recordings, 0);
    }
    close_both();
}

static void
many_sizes_leave_memory_flat(void)
{
    static float out[COUNT * 4];
    size_t after_first = 0;
    open_both();
    for (int round = 0; round < 3; round++) {
        for (int64_t size = 2; size <= 12; size++) {
            CHECK_OK(call(&there, size, (ac_stream){0}, true, out));
        }
        after_first = round ? after_first : far.live;
        CHECK_INT(far.live, after_first);
    }
    close_both();
}

/* ---- another allocator ----------------------------------------------------------------------- */

/* Hands out far memory, in the order of a stream of its own. */
typedef struct other_memory {
    int64_t given, back, fail_at;
    int32_t index;
    struct handle *out; /* what is given and not back */
    ac_device *device;  /* NULL: not to be asked for a lane */
} other_memory;

typedef struct handle {
    other_memory *owner;
    void *memory;
    struct handle *next;
} handle;

static ac_status
other_alloc(void *self, int32_t index, size_t bytes, void **out, void **made, void **stream)
{
    other_memory *other = self;
    handle *h = malloc(sizeof *h);
    CHECK(h);
    if (other->fail_at && --other->fail_at == 0) {
        free(h);
        return ac_error(AC_E_MEMORY, "other: none left");
    }
    CHECK_OK(far_alloc(NULL, bytes, out));
    *h = (handle){other, *out, other->out};
    other->out = h;
    other->given++;
    other->index = index;
    *made = h;
    *stream = (void *)(uintptr_t)5;
    return AC_OK;
}

static void
other_free(void *made)
{
    handle *h = made, **at = &h->owner->out;
    while (*at != h) {
        at = &(*at)->next;
    }
    *at = h->next;
    h->owner->back++;
    if (h->owner->device) { /* PyTorch's may wait for a thread that takes a lane */
        ac_device_lane *lane;
        CHECK_OK(ac_device_lane_take(h->owner->device, NULL, &lane));
        ac_device_lane_give(h->owner->device, lane);
    }
    far_free(NULL, h->memory);
    free(h);
}

/* Waited for when it comes and before it goes; what was there before goes back where it was from.
 * Without a byte left, nothing of the failed run stays. */
static void
another_allocator_serves_from_then_on(void)
{
    other_memory other = {.index = -1}, second = {0};
    open_both();
    want = (request){.schedule = schedules[5], .guidance = 2.0};
    CHECK_OK(denoise(&cpu, &want));
    got = want;
    CHECK_OK(denoise(&there, &got));
    int64_t own = far.blocks;
    CHECK(own > 0);
    CHECK_OK(ac_device_set_memory(ac_model_device(there.model),
                                  &(ac_memory){other_alloc, other_free, &other}));
    CHECK_OK(ac_device_set_memory(ac_model_device(there.model),
                                  &(ac_memory){other_alloc, other_free, &second}));
    ac_model_drop_plans(there.model);
    ac_weights_drop_derived(there.weights);
    CHECK_INT(far.blocks, 0);
    for (int64_t nth = 0; nth < 40; nth++) {
        int64_t live = other.given - other.back;
        got = want;
        other.fail_at = nth;
        ac_status status = denoise(&there, &got);
        if (status < 0) {
            CHECK_STATUS(status, AC_E_MEMORY, "which are free, but not for this process");
            CHECK(other.given - other.back <= live);
        } else {
            same_latents(&got, &want);
        }
        if (nth % 4 == 3) {
            ac_model_drop_plans(there.model);
            ac_weights_drop_derived(there.weights);
        }
        CHECK_INT(other.given - other.back, far.blocks);
    }
    CHECK(other.given >= 40 && second.given == 0);
    CHECK_INT(other.index, 0);
    CHECK_INT(far.stream_waits, other.given);
    CHECK_INT(far.device_waits, other.back);
    close_both();
    CHECK_INT(other.given, other.back);
}

/* Who gets it next would write what is still read. */
static void
what_was_not_waited_for_is_not_given_back(void)
{
    other_memory other = {.index = -1};
    open_both();
    want = (request){.schedule = schedules[5], .guidance = 2.0};
    CHECK_OK(denoise(&cpu, &want));
    CHECK_OK(ac_device_set_memory(ac_model_device(there.model),
                                  &(ac_memory){other_alloc, other_free, &other}));
    for (int64_t kept = 1; kept <= 2; kept++) {
        got = want;
        CHECK_OK(denoise(&there, &got));
        same_latents(&got, &want);
        far.fail_waits = 1;
        ac_model_drop_plans(there.model);
        ac_weights_drop_derived(there.weights);
        CHECK_INT(far.fail_waits, 0);
        CHECK_INT(other.given - other.back, kept);
    }
    CHECK_OK(denoise(&there, &got));
    int64_t back = other.back;
    other.device = ac_model_device(there.model);
    ac_device_trim(other.device);
    CHECK_INT(other.back, back + 1);
    other.device = NULL;
    ac_model_drop_plans(there.model);
    ac_weights_drop_derived(there.weights);
    CHECK_INT(other.given - other.back, 2);
    while (other.out) {
        other_free(other.out);
    }
    close_both();
}

/* A run finds the room that the idle lane's smaller arena leaves, and nobody else's. */
static void
room_is_made_for_larger_plans(void)
{
    static float out[COUNT * 36];
    ac_build_args args = {.entry = "forward", .batch = IMAGES, .height = SIZE, .width = SIZE,
                          .tokens = TOKENS, .timesteps = 1};
    size_t freed;
    open_both();
    CHECK_OK(ac_model_make_room(there.model, &args, &freed));
    CHECK_INT(freed, 0); /* nothing is there */
    CHECK_OK(call(&there, SIZE, (ac_stream){0}, true, out));
    CHECK_OK(ac_model_make_room(there.model, &args, &freed));
    CHECK_INT(freed, 0); /* it is large enough */
    args.height = args.width = MOST;
    size_t live = far.live;
    CHECK_OK(ac_model_make_room(there.model, &args, &freed));
    CHECK(freed > 0 && live - far.live == freed);
    CHECK_OK(call(&there, MOST, (ac_stream){0}, true, out));
    CHECK_OK(ac_model_make_room(there.model, &args, &freed));
    CHECK_INT(freed, 0);
    close_both();
}

TEST_MAIN(TEST(only_what_steps_read_stays), TEST(laid_out_weights_are_borrowed),
          TEST(out_of_memory_leaves_nothing), TEST(dropped_memory_comes_back),
          TEST(many_sizes_leave_memory_flat),
          TEST(another_allocator_serves_from_then_on),
          TEST(what_was_not_waited_for_is_not_given_back), TEST(room_is_made_for_larger_plans))
