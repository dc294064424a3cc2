/* test_kernels: every kernel of every list against the plain reference, checked and timed at one
 * call site (after dav1d's checkasm).
 *
 *     test_kernels [--backend cpu] [--isa base|avx2|avx512] [--bench] [--seed n]
 *                  [--op linear,conv2d]  these alone; "-linear,conv2d": all others
 *                  [--all]      real shapes too, sampled (default: those under 1 GFLOP)
 *                  [--quick]    own kernels, small shapes and random inputs: for slow checkers
 *                  [--flops 1e7]  the largest shapes of --quick
 *                  [--kernel text]  those whose name has it
 *                  [--keep-going]  to the next case after a mismatch
 *                  [--dtype f32|f16|bf16]  of operands and results (GPU)
 *                  [--tf32]     products of f32 may be TF32 (GPU)
 *
 * Small problems are compared in every element, large ones in 4,096 random elements and the
 * corners.  CPU kernels run with 1 and with 3 threads, and both results must agree to the bit;
 * where a backend records, the second run is a replay.  The first mismatch is printed with what is
 * needed to see it again; the exit status is then 1.
 */
#include "check_cases.h"
#include "check_cases_cuda.h"

#include "../../csrc/backend_cuda.h"

typedef struct options {
    const char *op, *backend, *kernel;
    int32_t isa; /* -1: all that the machine has */
    uint64_t seed;
    double flops; /* most, for quick */
    ac_dtype dtype;
    bool bench, all, quick, keep_going, tf32;
} options;

/* One case made concrete: operands on the host, the result and what it should be. */
typedef struct setup {
    const check_case *c;
    family family;
    uint64_t seed;
    ac_problem problem; /* host addresses */
    ac_tensor input[MAX_OPERANDS];
    int64_t span[MAX_OPERANDS], out_span; /* elements of the buffers behind the views */
    double *expected;   /* [samples] */
    int64_t *sample;    /* flat output index; NULL: all */
    int64_t samples;
} setup;

static ac_lane *oracle_lane; /* the CPU's */
static size_t oracle_scratch;

/* ---- setting up ------------------------------------------------------------------------------ */

static void
setup_operands(setup *s)
{
    const check_case *c = s->c;
    uint64_t state = s->seed * 2 + 1;
    s->problem = (ac_problem){
        .op = c->op, .attr = c->attr, .n_inputs = c->n_inputs, .input = s->input};
    for (int32_t i = 0; i < c->n_inputs; i++) {
        ac_tensor *t = &s->input[i];
        *t = (ac_tensor){.dtype = c->dtype[i], .shape = c->shape[i]};
        if (t->shape.rank < 0) {
            continue;
        }
        bool view = c->strided && ac_dtype_is_float(t->dtype) && t->shape.rank > 1 &&
                    !(i == 1 && c->op != AC_OP_ATTENTION && c->op != AC_OP_CONCAT &&
                      c->op != AC_OP_ADD);
        s->span[i] = view_strides(t, view);
        t->data = malloc((size_t)s->span[i] * ac_dtype_size(t->dtype));
        fill_operand(c, i, s->family, t, s->span[i], &state);
    }
    ac_tensor *out = &s->problem.output;
    *out = (ac_tensor){.dtype = c->out_dtype, .shape = c->wanted};
    AC_TRY_CASE(ac_op_shape(c->op, &c->attr, c->shape, c->n_inputs, &out->shape));
    s->out_span = view_strides(out, c->strided && out->shape.rank > 1);
}

static const ac_kernel *
plain_kernel(ac_op op)
{
    const ac_kernel *found = NULL;
    for (const ac_kernel *const *k = ac_backend_cpu.kernels; *k; k++) {
        found = (*k)->op == op ? *k : found; /* the last one is the reference */
    }
    return found;
}

static void
run_plain(const ac_problem *p)
{
    const ac_kernel *kernel = plain_kernel(p->op);
    size_t bytes = kernel->worker_scratch ? kernel->worker_scratch(p, &(ac_caps){0}) : 0;
    if (bytes > oracle_scratch) {
        AC_TRY_CASE(ac_backend_cpu.lane_reserve(NULL, oracle_lane, bytes));
        oracle_scratch = bytes;
    }
    AC_TRY_CASE(kernel->launch(oracle_lane, p, NULL, NULL));
}

/* Which elements to look at: random ones and every combination of first and last indices. */
static void
choose_samples(setup *s, int64_t count, int64_t wanted)
{
    const ac_shape *shape = &s->problem.output.shape;
    uint64_t state = s->seed * 2 + 1;
    int64_t corners = (int64_t)1 << shape->rank;
    s->samples = wanted + corners;
    s->sample = malloc(sizeof *s->sample * (size_t)s->samples);
    for (int64_t i = 0; i < wanted; i++) {
        s->sample[i] = (int64_t)(next_random(&state) % (uint64_t)count);
    }
    for (int64_t i = 0; i < corners; i++) {
        int64_t at = 0;
        for (int d = 0; d < shape->rank; d++) {
            at = at * shape->dim[d] + (i >> d & 1 ? shape->dim[d] - 1 : 0);
        }
        s->sample[wanted + i] = at;
    }
}

static void
expect_all(setup *s)
{
    ac_problem p = s->problem;
    s->samples = ac_tensor_count(&p.output);
    s->expected = malloc(sizeof(double) * (size_t)AC_MAX(s->samples, 1));
    p.output = ac_tensor_of(s->expected, AC_F64, p.output.shape);
    run_plain(&p);
}

static void
expect_samples(setup *s)
{
    int64_t columns = s->problem.output.shape.dim[s->problem.output.shape.rank - 1];
    s->expected = malloc(sizeof(double) * (size_t)s->samples);
    double result[1024];
    for (int64_t i = 0; i < s->samples; i++) {
        ac_tensor input[MAX_OPERANDS];
        ac_problem p = s->problem;
        memcpy(input, s->input, sizeof input);
        p.input = input;
        int64_t row = s->sample[i] / columns, column = s->sample[i] % columns;
        narrow_problem(&p, row, column);
        ac_shape shape, operands[MAX_OPERANDS];
        for (int32_t k = 0; k < p.n_inputs; k++) {
            operands[k] = input[k].shape;
        }
        AC_TRY_CASE(ac_op_shape(p.op, &p.attr, operands, p.n_inputs, &shape));
        p.output = ac_tensor_of(result, AC_F64, shape);
        run_plain(&p);
        s->expected[i] = result[p.op == AC_OP_ATTENTION ? column % shape.dim[2] : 0];
    }
}

static void
setup_expected(setup *s)
{
    int64_t count = ac_tensor_count(&s->problem.output);
    double flops = ac_op_flops(s->c->op, &s->c->attr, s->c->shape, s->c->n_inputs,
                               &s->problem.output.shape);
    ac_tensor input[MAX_OPERANDS];
    ac_problem part = s->problem;
    memcpy(input, s->input, sizeof input);
    part.input = input;
    if (flops < 1e8 || !narrow_problem(&part, 0, 0)) {
        expect_all(s);
        return;
    }
    choose_samples(s, count, s->c->op == AC_OP_ATTENTION ? 256 : 4096);
    expect_samples(s);
}

static void
setup_free(setup *s)
{
    for (int32_t i = 0; i < s->c->n_inputs; i++) {
        free(s->input[i].data);
    }
    free(s->expected);
    free(s->sample);
}

/* ---- running one kernel ---------------------------------------------------------------------- */

typedef struct bench_result {
    double best; /* seconds */
} bench_result;

/* Launches `times` times, recorded and replayed where the backend can; seconds of one launch. */
static double
launch_timed(const ac_backend *backend, void *self, ac_lane *lane, const ac_kernel *kernel,
             const ac_problem *p, void *scratch, const void *prepared, int times, bool replay)
{
    ac_recording *recording = NULL;
    if (replay && backend->record_begin) {
        AC_TRY_CASE(kernel->launch(lane, p, scratch, prepared)); /* what is made at first use */
        AC_TRY_CASE(backend->sync(self, lane));
        AC_TRY_CASE(backend->record_begin(self, lane));
        for (int i = 0; i < times; i++) {
            AC_TRY_CASE(kernel->launch(lane, p, scratch, prepared));
        }
        AC_TRY_CASE(backend->record_end(self, lane, &recording));
        AC_TRY_CASE(backend->replay(self, lane, recording));
        AC_TRY_CASE(backend->sync(self, lane));
    }
    double start = seconds();
    if (recording) {
        AC_TRY_CASE(backend->replay(self, lane, recording));
    } else {
        AC_TRY_CASE(kernel->launch(lane, p, scratch, prepared));
    }
    AC_TRY_CASE(backend->sync(self, lane));
    double taken = seconds() - start;
    if (recording) {
        backend->record_free(self, recording);
    }
    return taken / (recording ? times : 1);
}

/* Runs the kernel on the backend; `result` has out_span elements and comes back whole. */
static void
run_kernel(const ac_backend *backend, void *self, const ac_kernel *kernel, const ac_caps *caps,
           const setup *s, char *result, int repeats, bool replay, bench_result *bench)
{
    ac_lane *lane;
    ac_tensor input[MAX_OPERANDS];
    ac_problem p = s->problem;
    void *memory[MAX_OPERANDS] = {NULL}, *out, *scratch = NULL, *prepared = NULL;
    size_t out_bytes = (size_t)s->out_span * ac_dtype_size(p.output.dtype);
    memcpy(input, s->input, sizeof input);
    p.input = input;
    AC_TRY_CASE(backend->lane_open(self, &lane));
    for (int32_t i = 0; i < p.n_inputs; i++) {
        size_t bytes = (size_t)s->span[i] * ac_dtype_size(input[i].dtype);
        if (input[i].shape.rank >= 0) {
            AC_TRY_CASE(backend->alloc(self, bytes, &memory[i]));
            AC_TRY_CASE(backend->upload(self, lane, memory[i], s->input[i].data, bytes));
            input[i].data = memory[i];
        }
    }
    AC_TRY_CASE(backend->alloc(self, out_bytes, &out));
    AC_TRY_CASE(backend->upload(self, lane, out, result, out_bytes));
    p.output.data = out;
    if (kernel->worker_scratch) {
        AC_TRY_CASE(backend->lane_reserve(self, lane, kernel->worker_scratch(&p, caps)));
    }
    if (kernel->scratch) {
        AC_TRY_CASE(backend->alloc(self, kernel->scratch(&p, caps), &scratch));
    }
    size_t prepared_bytes = kernel->prepared_bytes ? kernel->prepared_bytes(&p, caps) : 0;
    if (prepared_bytes) { /* 0: this problem's weights are right as they are */
        AC_TRY_CASE(backend->alloc(self, prepared_bytes, &prepared));
        AC_TRY_CASE(kernel->prepare(lane, &p, prepared));
    }
    bench->best = 1e30;
    for (int i = 0; i < repeats; i++) {
        double taken = launch_timed(backend, self, lane, kernel, &p, scratch, prepared,
                                    repeats > 1 ? 20 : 1, replay || repeats > 1);
        bench->best = AC_MIN(bench->best, taken);
    }
    AC_TRY_CASE(backend->download(self, lane, result, out, out_bytes));
    AC_TRY_CASE(backend->sync(self, lane));
    for (int32_t i = 0; i < p.n_inputs; i++) {
        backend->free(self, memory[i]);
    }
    backend->free(self, out);
    backend->free(self, scratch);
    backend->free(self, prepared);
    backend->lane_close(self, lane);
}

/* ---- comparing ------------------------------------------------------------------------------- */

static void
describe(const setup *s, const char *kernel, const char *isa)
{
    ac_text attr = {0};
    ac_op_attr_text(s->c->op, &s->c->attr, &attr);
    printf("%s isa %s family %s seed %llu%s\n  %s ->", kernel, isa, family_names[s->family],
           (unsigned long long)s->seed, s->c->strided ? " strided" : "",
           attr.data ? attr.data : "");
    for (int32_t i = 0; i < s->c->n_inputs; i++) {
        char text[AC_SHAPE_TEXT];
        printf(" %s", s->c->shape[i].rank < 0 ? "-" : ac_shape_text(&s->c->shape[i], text));
    }
    printf("\n");
    ac_text_free(&attr);
}

static int64_t
element_offset(const ac_tensor *t, int64_t flat)
{
    int64_t at = 0;
    for (int d = t->shape.rank - 1; d >= 0; d--) {
        at += flat % t->shape.dim[d] * t->stride[d];
        flat /= t->shape.dim[d];
    }
    return at;
}

/* What the output's dtype can hold adds to the tolerance. */
static double
rounding_of(ac_dtype dtype)
{
    return dtype == AC_F16 ? 5e-4 : dtype == AC_BF16 ? 4e-3 : 0.0;
}

static bool
agrees(const setup *s, const ac_kernel *kernel, const char *isa, const char *result)
{
    const ac_tensor *out = &s->problem.output;
    tolerance allowed = tolerance_of(s->c->op, s->family);
    double most = 0.0, squares = 0.0, error_squares = 0.0;
    for (int64_t i = 0; i < s->samples; i++) {
        most = fmax(most, fabs(s->expected[i]));
        squares += s->expected[i] * s->expected[i];
    }
    /* Of factors, then; cuDNN cuts them off, so that errors of a large mean add up. */
    double rounding = s->problem.tf32 ? 2.5e-3 : rounding_of(out->dtype);
    if (s->c->op == AC_OP_ATTENTION) {
        rounding *= 2.0; /* the exponents are rounded too, before they meet v */
    }
    const ac_linear_attr *linear = &s->c->attr.linear;
    if (s->c->op == AC_OP_LINEAR) { /* in parts: value and gate, x before its activation, x1 w1 */
        bool parts = linear->act != AC_ACT_NONE || s->c->shape[AC_LINEAR_X2].rank >= 0;
        rounding *= linear->gated ? 3.0 : parts ? 2.0 : 1.0;
    }
    double limit = (allowed.most + rounding) * most + (rounding ? 6e-8 : 1e-30);
    double worst = 0.0;
    for (int64_t i = 0; i < s->samples; i++) {
        int64_t flat = s->sample ? s->sample[i] : i;
        double got = ac_element_get(result, out->dtype, element_offset(out, flat));
        double error = fabs(got - s->expected[i]);
        bool overflow = out->dtype == AC_F16 && isinf(got) &&
                        fabs(s->expected[i]) > 65504.0 * (1.0 - rounding);
        error_squares += overflow ? 0.0 : error * error;
        worst = overflow ? worst : fmax(worst, error);
        if (!overflow && !(error <= limit)) {
            describe(s, kernel->name, isa);
            printf("  element %lld: expected %.9g, got %.9g, error %.3g, allowed %.3g\n",
                   (long long)flat, s->expected[i], got, error, limit);
            return false;
        }
    }
    double nmse = allowed.nmse + rounding * rounding;
    if (most > 1e-30 && most < 1e30 && error_squares > nmse * squares) {
        describe(s, kernel->name, isa);
        printf("  NMSE: found %.3g, expected at most %.3g\n", error_squares / squares, nmse);
        return false;
    }
    return true;
}

/* Elements between the rows of an output view belong to someone else. */
static bool
gaps_untouched(const setup *s, const ac_kernel *kernel, const char *isa, const char *result)
{
    const ac_tensor *out = &s->problem.output;
    size_t size = ac_dtype_size(out->dtype);
    if (!s->c->strided || out->shape.rank < 2) {
        return true;
    }
    int64_t columns = out->shape.dim[out->shape.rank - 1], pitch = columns + view_gap;
    for (int64_t at = 0; at < s->out_span * (int64_t)size; at++) {
        if (at / (int64_t)size % pitch >= columns && result[at] != 0x5a) {
            describe(s, kernel->name, isa);
            printf("  written between the rows, at element %lld\n",
                   (long long)(at / (int64_t)size));
            return false;
        }
    }
    return true;
}

/* ---- the one call site ----------------------------------------------------------------------- */

static bool
check_kernel(const ac_backend *backend, void *self, const ac_kernel *kernel, const ac_caps *caps,
             const setup *s, const options *o, const char *isa)
{
    bool cpu = backend == &ac_backend_cpu;
    bench_result bench;
    size_t bytes = (size_t)s->out_span * ac_dtype_size(s->problem.output.dtype);
    char *result = malloc(bytes), *again = malloc(bytes);
    memset(result, 0x5a, bytes);
    memset(again, 0x5a, bytes);
    if (cpu) {
        AC_TRY_CASE(ac_pool_set_threads(1));
    }
    run_kernel(backend, self, kernel, caps, s, result, o->bench && s->c->real ? 5 : 1, false,
               &bench);
    bool right = agrees(s, kernel, isa, result) && gaps_untouched(s, kernel, isa, result);
    if (right && !(o->bench && s->c->real)) {
        bench_result ignored;
        if (cpu) {
            AC_TRY_CASE(ac_pool_set_threads(3));
        }
        run_kernel(backend, self, kernel, caps, s, again, 1, true, &ignored);
        if (memcmp(result, again, bytes) != 0) {
            describe(s, kernel->name, isa);
            printf("  another run (%s) gave other bits\n", cpu ? "3 threads" : "a replay");
            right = false;
        }
    }
    if (right && o->bench && s->c->real) {
        double flops = ac_op_flops(s->c->op, &s->c->attr, s->c->shape, s->c->n_inputs,
                                   &s->problem.output.shape);
        describe(s, kernel->name, isa);
        printf("  %10.1f us %8.1f GFLOP/s\n", bench.best * 1e6, flops / bench.best * 1e-9);
    }
    free(result);
    free(again);
    return right;
}

static const char *const isa_names[] = {"base", "avx2", "avx512"};

/* Every kernel that takes the problem, at every instruction set that the machine has. */
static bool
check_setup(const ac_backend *backend, void *self, const ac_caps *caps, const setup *s,
            const options *o, int64_t *checks)
{
    bool cpu = backend == &ac_backend_cpu;
    for (const ac_kernel *const *k = backend->kernels; *k; k++) {
        bool plain = cpu && *k == plain_kernel(s->c->op);
        const ac_kernel *tested = *k;
        if (tested->op != s->c->op || !strstr(tested->name, o->kernel) ||
            (plain && (s->c->real || s->family != RANDOM)) ||
            (o->quick && (strstr(tested->name, "cublas") || strstr(tested->name, "cudnn")))) {
            continue;
        }
        for (int32_t isa = cpu && !plain ? 0 : caps->isa; isa <= caps->isa; isa++) {
            ac_caps forced = {.isa = isa, .workers = caps->workers};
            const char *name = cpu ? isa_names[isa] : backend->name;
            if ((o->isa >= 0 && cpu && isa != o->isa) || !tested->supports(&s->problem, &forced)) {
                continue;
            }
            ++*checks;
            if (!check_kernel(backend, self, tested, &forced, s, o, name)) {
                return false;
            }
        }
    }
    return true;
}

static bool
is_product(ac_op op)
{
    return op == AC_OP_LINEAR || op == AC_OP_CONV2D || op == AC_OP_UP_CONV2D ||
           op == AC_OP_ATTENTION;
}

static bool
check_case_families(const ac_backend *backend, void *self, const ac_caps *caps,
                    const check_case *c, const options *o, int64_t *checks)
{
    bool conversions = c->op == AC_OP_CAST || c->op == AC_OP_TO_NCHW || c->op == AC_OP_TO_NHWC;
    for (int f = 0; f < FAMILIES; f++) {
        if ((c->real || c->op == AC_OP_TIMESTEP || conversions || o->quick) && f != RANDOM) {
            continue;
        }
        if (o->dtype == AC_F16 && (f == TINY || f == HUGE_VALUES)) {
            continue; /* 0 and infinity there */
        }
        /* Huge scores make softmax a lottery between equals; it has no right answer in f32. */
        if (c->op == AC_OP_ATTENTION && (f == HUGE_VALUES || f == LARGE_MEAN || f == OUTLIER)) {
            continue;
        }
        setup s = {.c = c, .family = (family)f, .seed = o->seed + (uint64_t)f};
        setup_operands(&s);
        s.problem.tf32 = o->tf32 && is_product(c->op);
        setup_expected(&s);
        bool right = check_setup(backend, self, caps, &s, o, checks);
        setup_free(&s);
        if (!right) {
            return false;
        }
    }
    return true;
}

static options
parse_options(int argc, char **argv)
{
    options o = {.op = "", .kernel = "", .backend = "cpu", .isa = -1, .seed = 1,
                 .flops = 1e7};
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        if (strcmp(argv[i], "--bench") == 0) {
            o.bench = true;
        } else if (strcmp(argv[i], "--all") == 0) {
            o.all = true;
        } else if (strcmp(argv[i], "--quick") == 0) {
            o.quick = true;
        } else if (strcmp(argv[i], "--keep-going") == 0) {
            o.keep_going = true;
        } else if (strcmp(argv[i], "--tf32") == 0) {
            o.tf32 = true;
        } else if (strcmp(argv[i], "--dtype") == 0) {
            o.dtype = strcmp(value, "bf16") == 0  ? AC_BF16
                      : strcmp(value, "f16") == 0 ? AC_F16
                                                  : AC_F32;
            i++;
        } else if (strcmp(argv[i], "--op") == 0) {
            o.op = value;
            i++;
        } else if (strcmp(argv[i], "--kernel") == 0) {
            o.kernel = value;
            i++;
        } else if (strcmp(argv[i], "--backend") == 0) {
            o.backend = value;
            i++;
        } else if (strcmp(argv[i], "--flops") == 0) {
            o.flops = strtod(value, NULL);
            i++;
        } else if (strcmp(argv[i], "--seed") == 0) {
            o.seed = strtoull(value, NULL, 10);
            i++;
        } else if (strcmp(argv[i], "--isa") == 0) {
            o.isa = strcmp(value, "base") == 0 ? 0 : strcmp(value, "avx2") == 0 ? 1 : 2;
            i++;
        } else {
            printf("unknown option %s; see the head of test_kernels.c\n", argv[i]);
            exit(2);
        }
    }
    return o;
}

/* Whether the list of --op has the op, or lacks it where it begins with a minus. */
static bool
op_wanted(const char *list, ac_op op)
{
    const char *name = ac_op_name(op);
    bool others = *list == '-', found = false;
    list += others;
    for (const char *at = list; *at && !found; at += strcspn(at, ","), at += *at == ',') {
        size_t length = strcspn(at, ",");
        found = length == strlen(name) && strncmp(at, name, length) == 0;
    }
    return !*list || found != others;
}

/* f32 operands and results become `dtype`; CAST has its own pairs. */
static void
set_dtype(case_list *list, ac_dtype dtype)
{
    view_gap = 8;
    for (int32_t i = 0; i < list->count; i++) {
        check_case *c = &list->at[i];
        for (int32_t k = 0; c->op != AC_OP_CAST && k < c->n_inputs; k++) {
            c->dtype[k] = c->dtype[k] == AC_F32 ? dtype : c->dtype[k];
        }
        if (c->op != AC_OP_CAST && c->out_dtype == AC_F32) {
            c->out_dtype = dtype;
        }
    }
}

int
main(int argc, char **argv)
{
    options o = parse_options(argc, argv);
    ac_device *device;
    ac_backend_cuda_set_folder("python/accel");
    AC_TRY_CASE(ac_device_open(o.backend, &device));
    AC_TRY_CASE(ac_backend_cpu.lane_open(NULL, &oracle_lane));
    case_list list = {0};
    all_cases(&list);
    if (strncmp(o.backend, "cuda", 4) == 0) {
        cuda_cases(&list);
    }
    if (o.dtype != AC_F32) {
        set_dtype(&list, o.dtype);
    }
    int64_t checks = 0;
    bool right = true;
    for (int32_t i = 0; (right || o.keep_going) && i < list.count; i++) {
        const check_case *c = &list.at[i];
        ac_shape out = c->wanted;
        AC_TRY_CASE(ac_op_shape(c->op, &c->attr, c->shape, c->n_inputs, &out));
        double flops = ac_op_flops(c->op, &c->attr, c->shape, c->n_inputs, &out);
        bool wanted = o.bench ? c->real : !c->real || o.all || flops < 1e9;
        wanted = wanted && (!o.quick || flops < o.flops);
        if (wanted && op_wanted(o.op, c->op)) {
            right &= check_case_families(device->backend, device->self, &device->caps, c, &o,
                                         &checks);
        }
    }
    printf("  %s: %lld kernel runs checked over %d cases%s\n", o.backend, (long long)checks,
           list.count, right && checks ? "" : ": FAILED");
    free(list.at);
    ac_backend_cpu.lane_close(NULL, oracle_lane);
    ac_device_unref(device);
    return right && checks ? 0 : 1; /* none: a name that is none */
}
