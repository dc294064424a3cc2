/* test_far: the engine on a device whose memory it must not touch (far_device.h), against the CPU:
 * uploads, slots, recordings, streams and the loop. */
#include "../../csrc/profile.h"
#include "far_rig.h"

static request want, got;

/* Each sampler, with and without guidance, host and device operands; a second call replays from its
 * first step on. */
static void
loops_agree_with_the_cpu(void)
{
    open_both();
    for (size_t i = 0; i < AC_ARRAY_LEN(schedules); i++) {
        for (int kind = 0; kind < 5; kind++) {
            bool tail = kind != 2 && kind != 4 && !strstr(schedules[i], "thresholding");
            far.no_tail = kind == 4;
            want = (request){.schedule = schedules[i], .guidance = kind ? 3.0 : 1.0,
                             .rescale = kind == 2 ? 0.7 : 0.0, .ragged = kind == 1};
            CHECK_OK(denoise(&cpu, &want));
            for (int call = 0; call < 3; call++) {
                got = want;
                got.queue = kind == 3;
                start_count();
                CHECK_OK(denoise(&there, &got));
                same_latents(&got, &want);
                CHECK(far.replays >= (call ? STEPS : STEPS - 1) || call == 0);
                CHECK(call == 0 || far.uploads <= 5);
                CHECK(tail ? far.tails >= STEPS : far.tails == 0);
                CHECK(tail ? far.samplers == 1 : far.samplers >= 2 * STEPS);
            }
        }
    }
    far.no_tail = false;
    close_both();
}

/* ---- callbacks ------------------------------------------------------------------------------- */

static ac_status
add_in_place(void *arg, int32_t index, double timestep, float *latents)
{
    (void)arg;
    (void)timestep;
    for (int64_t i = 0; index == 1 && i < COUNT; i++) {
        latents[i] += 0.25f;
    }
    return 0;
}

static ac_status
stop_early(void *arg, int32_t index, double timestep, float *latents)
{
    (void)arg;
    (void)timestep;
    latents[0] += 1.0f;
    return index == 2;
}

static ac_status
raise_early(void *arg, int32_t index, double timestep, float *latents)
{
    (void)arg;
    (void)timestep;
    (void)latents;
    return index == 2 ? ac_error(AC_E_CANCELLED, "the callback raised") : 0;
}

static void
callbacks_see_and_change_latents(void)
{
    static const ac_step_fn callbacks[] = {add_in_place, stop_early, raise_early};
    open_both();
    for (size_t i = 0; i < AC_ARRAY_LEN(callbacks); i++) {
        for (int there_too = 0; there_too < 2; there_too++) {
            want = (request){.schedule = schedules[4], .guidance = 2.0, .callback = callbacks[i]};
            got = want;
            got.queue = there_too;
            ac_status status = denoise(&cpu, &want);
            start_count();
            CHECK_INT(denoise(&there, &got), status);
            same_latents(&got, &want);
            /* scaled at the start, and again where latents came from the callback */
            CHECK_INT(far.tails, i == 0 ? STEPS : 3);
            CHECK_INT(far.samplers, i == 0 ? STEPS : 3);
        }
    }
    close_both();
}

/* ---- without a callback ---------------------------------------------------------------------- */

static int32_t polled;

static ac_status
count_rows(void *arg, int32_t index, double timestep)
{
    (void)arg;
    CHECK_INT(index, polled++);
    CHECK(timestep >= 0.0);
    return 0;
}

static ac_status
stop_at_third(void *arg, int32_t index, double timestep)
{
    (void)arg;
    (void)timestep;
    return index == 2;
}

/* Between the rows nothing is copied and nobody waits; with a callback both happen at each row. */
static void
rows_follow_each_other(void)
{
    open_both();
    for (int kind = 0; kind < 4; kind++) {
        bool queue = kind % 2, calls = kind >= 2;
        for (int call = 0; call < 3; call++) {
            got = (request){.schedule = schedules[3], .guidance = 2.0, .queue = queue,
                            .poll = calls ? NULL : count_rows,
                            .callback = calls ? add_in_place : NULL};
            polled = 0;
            start_count();
            CHECK_OK(denoise(&there, &got));
        }
        int64_t moves = calls ? 2 * STEPS : 1; /* out and in each time, or out at the end */
        CHECK_INT(polled, calls ? 0 : STEPS);
        CHECK_INT(far.replays, STEPS);
        CHECK_INT(far.syncs, queue ? 0 : calls ? moves + 1 : moves);
        CHECK_INT(far.downloads, queue ? 0 : calls ? STEPS : 1);
        CHECK_INT(far.copies, queue ? moves + 1 : 0);
    }
    close_both();
}

static void
a_poll_ends_the_run(void)
{
    open_both();
    want = (request){.schedule = schedules[4], .guidance = 2.0, .poll = stop_at_third};
    CHECK_OK(denoise(&cpu, &want));
    for (int queue = 0; queue < 2; queue++) {
        got = (request){.schedule = schedules[4], .guidance = 2.0, .poll = stop_at_third,
                        .queue = queue};
        CHECK_OK(denoise(&there, &got));
        same_latents(&got, &want);
    }
    close_both();
}

static ac_status
break_second(void *arg, int32_t index, double timestep, float *latents)
{
    (void)arg;
    (void)timestep;
    latents[3] = index == 1 ? NAN : latents[3];
    return 0;
}

/* At the row where it came, whoever finds it, and only where it is asked for. */
static void
latents_that_are_not_finite_are_an_error(void)
{
    open_both();
    rig *both[] = {&cpu, &there};
    for (int kind = 0; kind < 12; kind++) {
        rig *r = both[kind % 2];
        bool calls = kind / 2 % 3 == 1, queue = kind / 2 % 3 == 2 && r == &there;
        bool finite = kind < 6;
        got = (request){.schedule = schedules[3], .guidance = 2.0, .queue = queue,
                        .finite = finite, .callback = calls ? break_second : NULL};
        if (!calls) {
            got.callback = NULL;
            ((float *)ac_weights_find(r->weights, "conv_out.bias")->data)[0] = NAN;
            ac_weights_check(r->weights);
        }
        start_count();
        ac_status status = denoise(r, &got);
        if (finite) {
            CHECK_STATUS(status, AC_E_NUMERIC, calls ? "after step 3 of 6" : "after step 1 of 6");
        } else {
            CHECK_OK(status);
            CHECK(!isfinite(got.latents[3]));
        }
        ((float *)ac_weights_find(r->weights, "conv_out.bias")->data)[0] = 0.0f;
        ac_weights_check(r->weights);
        got = (request){.schedule = schedules[3], .guidance = 2.0, .finite = true};
        CHECK_OK(denoise(r, &got));
    }
    close_both();
}

/* ---- what is no run -------------------------------------------------------------------------- */

/* A consumer's stream waits for a producer's, and only where the two differ. */
static void
streams_are_ordered_and_read(void)
{
    ac_stream producer = {.given = true}, consumer = {true, (void *)(uintptr_t)7};
    float there_too[4] = {1, 2, 3, 4}, here[4] = {0};
    ac_device *device;
    void *memory;
    ac_device_add_backend(&far_backend);
    CHECK_OK(ac_device_open("far", &device));
    CHECK_OK(device->backend->alloc(device->self, sizeof here, &memory));
    memcpy(memory, there_too, sizeof here);
    start_count();
    CHECK_OK(ac_device_order(device, producer, producer));
    CHECK_INT(far.waits, 0);
    CHECK_OK(ac_device_order(device, producer, consumer));
    CHECK_INT(far.waits, 1);
    CHECK_OK(ac_device_read(device, consumer, here, memory, sizeof here));
    CHECK(memcmp(here, there_too, sizeof here) == 0);
    CHECK_INT(far.syncs, 1);
    CHECK_INT(far.downloads, 1);
    CHECK(!device->lanes);
    device->backend->free(device->self, memory);
    ac_device_unref(device);
    CHECK_INT(far.live, 0);
}

/* ---- recording ------------------------------------------------------------------------------- */

static void
a_device_that_cannot_record_launches(void)
{
    open_both();
    want = (request){.schedule = schedules[3], .guidance = 2.0};
    CHECK_OK(denoise(&cpu, &want));
    far.fail_recordings = 1000;
    ac_model_stats stats;
    ac_model_get_stats(there.model, &stats);
    CHECK(!stats.unrecorded[0]);
    for (int call = 0; call < 2; call++) {
        got = want;
        start_count();
        CHECK_OK(denoise(&there, &got));
        same_latents(&got, &want);
        CHECK_INT(far.replays, 0);
        ac_model_get_stats(there.model, &stats);
        CHECK(strcmp(stats.unrecorded, "far: this launch cannot be recorded") == 0);
    }
    CHECK_INT(far.fail_recordings, 1000 - 3);
    far.fail_recordings = 0;
    close_both();
}

/* Somebody waited for the device meanwhile. */
static void
a_recording_that_fails_is_tried_again(void)
{
    open_both();
    want = (request){.schedule = schedules[3], .guidance = 2.0};
    CHECK_OK(denoise(&cpu, &want));
    for (int failures = 1; failures <= 2; failures++) {
        ac_model_drop_plans(there.model);
        far.fail_recordings = failures;
        got = want;
        start_count();
        CHECK_OK(denoise(&there, &got));
        same_latents(&got, &want);
        CHECK_INT(far.replays, STEPS - 1 - 2 * failures);
        ac_model_stats stats;
        ac_model_get_stats(there.model, &stats);
        CHECK(!stats.unrecorded[0]);
    }
    close_both();
}

static void
recording_is_switched_off(void)
{
    open_both();
    want = (request){.schedule = schedules[3], .guidance = 2.0};
    CHECK_OK(denoise(&cpu, &want));
    setenv("ACCEL_GRAPH", "off", 1);
    got = want;
    start_count();
    CHECK_OK(denoise(&there, &got));
    unsetenv("ACCEL_GRAPH");
    CHECK_INT(far.replays, 0);
    same_latents(&got, &want);
    ac_model_stats stats;
    ac_model_get_stats(there.model, &stats);
    CHECK(!stats.unrecorded[0]); /* nobody wanted one */
    close_both();
}

/* Its job lies in the device's memory, is recorded, and nothing of it stays. */
static void
a_loop_is_profiled_with_its_sampler(void)
{
    const ac_build_args args = {.entry = "forward", .batch = 2 * IMAGES, .height = SIZE,
                                .width = SIZE, .tokens = TOKENS, .timesteps = STEPS, .loop = true};
    const ac_profile_args how = {.repeats = 3};
    open_both();
    for (int call = 0; call < 2; call++) {
        ac_text text = {0};
        size_t live = far.live;
        start_count();
        CHECK_OK(ac_model_profile(there.model, &args, &how, true, &text));
        CHECK(strstr(text.data, "\"sampler\":{\"before_ms\":"));
        CHECK(strstr(text.data, "\"tail_ms\":0."));
        /* three sections, each twice, sampler and tail; the second call's own run replays too */
        CHECK_INT(far.replays, 8 * how.repeats + call);
        CHECK_INT(far.tails, how.repeats + 1);
        CHECK_INT(far.recordings, call);
        CHECK(call == 0 || far.live == live);
        ac_text_free(&text);
    }
    close_both();
}

static const char *const attention = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
                                     ".weight";

/* In place, with a check of the checksums, and by another binding. */
static void
changed_weights_are_read(void)
{
    static float other[1 << 12];
    open_both();
    for (int round = 0; round < 3; round++) {
        rig *both[] = {&cpu, &there};
        for (int k = 0; round && k < 2; k++) {
            const ac_tensor *t = ac_weights_find(both[k]->weights, attention);
            if (round == 1) {
                ((float *)t->data)[3] += 1.0f;
                CHECK(ac_weights_check(both[k]->weights) > 0);
            } else {
                ac_tensor moved = *t;
                CHECK(ac_tensor_count(t) <= (int64_t)AC_ARRAY_LEN(other));
                fill(other, ac_tensor_count(t), 77);
                moved.data = other;
                CHECK_OK(ac_weights_set(both[k]->weights, attention, &moved, NULL, NULL));
            }
        }
        want = got;
        want = (request){.schedule = schedules[3], .guidance = 2.0};
        CHECK_OK(denoise(&cpu, &want));
        got.generator = 0;
        request before = got;
        got = want;
        start_count();
        CHECK_OK(denoise(&there, &got));
        CHECK(far.replays > 0);
        same_latents(&got, &want);
        CHECK(round == 0 || memcmp(before.latents, got.latents, sizeof got.latents) != 0);
    }
    close_both();
}

/* ---- one run --------------------------------------------------------------------------------- */

static void
calls_agree_wherever_operands_are(void)
{
    static float expected[COUNT], found[COUNT];
    open_both();
    CHECK_OK(call(&cpu, SIZE, (ac_stream){0}, true, expected));
    for (int run = 0; run < 8; run++) {
        memset(found, 0, sizeof found);
        start_count();
        ac_stream stream = {run >= 4, (void *)(uintptr_t)(run / 2)};
        CHECK_OK(call(&there, SIZE, stream, run % 2, found));
        CHECK(memcmp(expected, found, sizeof found) == 0);
        CHECK(run < 2 || far.replays == 1);
        CHECK_INT(far.follows, 1);
        CHECK_INT(far.waits, run == 4 || run == 6); /* another stream than before */
    }
    close_both();
}

static void
strided_inputs_are_packed(void)
{
    static float x[COUNT], spaced[2 * COUNT], expected[COUNT], found[COUNT];
    float timestep = 400.0f;
    open_both();
    CHECK_OK(call(&cpu, SIZE, (ac_stream){0}, true, expected));
    fill(x, COUNT, 3);
    ac_exec *exec;
    ac_build_args args = {.entry = "forward", .batch = IMAGES, .height = SIZE, .width = SIZE,
                          .tokens = TOKENS, .timesteps = 1};
    ac_tensor sample = ac_tensor_of(spaced, AC_F32, AC_SHAPE(IMAGES, CHANNELS, SIZE, SIZE));
    ac_tensor times = ac_tensor_of(&timestep, AC_F32, AC_SHAPE(1));
    ac_tensor prompt = ac_tensor_of(states, AC_F32, AC_SHAPE(IMAGES, TOKENS, 8));
    ac_tensor result = ac_tensor_of(found, AC_F32, sample.shape);
    for (int run = 0; run < 6; run++) {
        int64_t step = run % 2 ? 2 : 1; /* gaps, or channels_last */
        int64_t stride[4] = {CHANNELS * SIZE * SIZE * step, step, SIZE * CHANNELS * step,
                             CHANNELS * step};
        memcpy(sample.stride, stride, sizeof stride);
        for (int64_t i = 0; i < COUNT; i++) {
            int64_t w = i % SIZE, h = i / SIZE % SIZE, c = i / (SIZE * SIZE) % CHANNELS;
            spaced[i / (CHANNELS * SIZE * SIZE) * stride[0] + c * stride[1] + h * stride[2] +
                   w * stride[3]] = x[i];
        }
        CHECK_OK(ac_model_take(there.model, &args, 0, &exec));
        CHECK_OK(ac_exec_bind_host(exec, "sample", &sample));
        CHECK_OK(ac_exec_bind_host(exec, "timestep", &times));
        CHECK_OK(ac_exec_bind_host(exec, "encoder_hidden_states", &prompt));
        CHECK_OK(ac_exec_bind_output_host(exec, "sample", &result));
        memset(found, 0, sizeof found);
        CHECK_OK(ac_exec_run(exec, AC_RATE_PROMPT));
        ac_model_give(there.model, exec);
        CHECK(memcmp(expected, found, sizeof found) == 0);
    }
    close_both();
}

TEST_MAIN(TEST(loops_agree_with_the_cpu), TEST(callbacks_see_and_change_latents),
          TEST(rows_follow_each_other), TEST(a_poll_ends_the_run),
          TEST(latents_that_are_not_finite_are_an_error), TEST(streams_are_ordered_and_read),
          TEST(a_device_that_cannot_record_launches),
          TEST(a_recording_that_fails_is_tried_again), TEST(recording_is_switched_off),
          TEST(a_loop_is_profiled_with_its_sampler), TEST(changed_weights_are_read),
          TEST(calls_agree_wherever_operands_are), TEST(strided_inputs_are_packed))
