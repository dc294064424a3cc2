/* driver: mutates, runs, keeps what reaches new code.  For machines without libFuzzer.
 *
 *     fuzz_x [--seconds 15] [--seed 1]     fuzz; a bad input is written to ./crash-fuzz_x
 *     fuzz_x FILE...                       run these inputs once
 *
 * The same seed makes the same inputs, as far as time allows.  The engine is compiled with
 * -fsanitize-coverage=trace-pc, so gcc alone is enough to be guided by coverage.  One input in
 * eight runs with an allocation that fails; which one follows from the bytes, so replay sees it.
 */
#include "fuzz.h"

#include <signal.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <sanitizer/common_interface_defs.h>

#define MAX_INPUT ((size_t)16384)
#define MAX_CORPUS 4096
#define HANG_SECONDS 20 /* under sanitizers, with another build beside it */

typedef struct input {
    size_t size;
    uint8_t bytes[MAX_INPUT];
} input;

static struct {
    char crash_path[256];
    input now;               /* what runs, for the crash file */
    input *corpus[MAX_CORPUS];
    size_t n_corpus;
    uint64_t random;
    int64_t executions, accepted, failed_allocations;
} fuzz;

/* ---- coverage ------------------------------------------------------------------------------- */

extern const char __executable_start; /* the linker's */

/* One byte for each 4 bytes of code, 32 MiB in all: the engine with sanitizers has a third. */
static uint8_t seen[(size_t)8 << 20];
static size_t n_seen;

void __sanitizer_cov_trace_pc(void);

__attribute__((no_sanitize("address", "undefined"))) void
__sanitizer_cov_trace_pc(void)
{
    size_t at = ((size_t)__builtin_return_address(0) - (size_t)&__executable_start) / 4;
    if (at < sizeof seen && !seen[at]) {
        seen[at] = 1;
        n_seen++;
    }
}

/* ---- running -------------------------------------------------------------------------------- */

static void
write_crash(void)
{
    FILE *file = fopen(fuzz.crash_path, "wb");
    if (file) {
        fwrite(fuzz.now.bytes, 1, fuzz.now.size, file);
        fclose(file);
        fprintf(stderr, "the input is in %s\n", fuzz.crash_path);
    }
}

static void
on_signal(int number)
{
    fprintf(stderr, number == SIGALRM ? "the input takes more than 20 s\n" : "aborted\n");
    write_crash();
    _exit(1);
}

/* gcc's two sanitizers have a runtime each, and the death callback reaches only the first's. */
const char *__ubsan_default_options(void);

const char *
__ubsan_default_options(void)
{
    return "abort_on_error=1:print_stacktrace=1";
}

/* Runs fuzz.now; true when the fuzzer accepted it. */
static bool
run(bool fail_allocations)
{
    uint64_t hash = ac_hash(fuzz.now.bytes, fuzz.now.size, AC_HASH_SEED);
    int64_t live = ac_alloc_live();
    /* An own block of exactly this size, so that one byte too many is seen. */
    uint8_t *copy = malloc(fuzz.now.size ? fuzz.now.size : 1);
    FUZZ_CHECK(copy != NULL);
    memcpy(copy, fuzz.now.bytes, fuzz.now.size);
    if (fail_allocations && hash >> 61 == 0) {
        int64_t nth = 1 + (int64_t)(hash % (hash & 1 << 20 ? 10 : 1000));
        ac_alloc_fail_at(nth);
        fuzz.failed_allocations++;
    }
    alarm(HANG_SECONDS);
    bool accepted = LLVMFuzzerTestOneInput(copy, fuzz.now.size) == 0;
    alarm(0);
    ac_alloc_fail_at(0);
    free(copy);
    if (ac_alloc_live() != live) {
        fprintf(stderr, "%lld allocations leaked\n", (long long)(ac_alloc_live() - live));
        abort();
    }
    fuzz.executions++;
    fuzz.accepted += accepted;
    return accepted;
}

/* ---- mutation ------------------------------------------------------------------------------- */

static size_t
below(size_t n)
{
    fuzz.random ^= fuzz.random >> 12;
    fuzz.random ^= fuzz.random << 25;
    fuzz.random ^= fuzz.random >> 27;
    return (size_t)((fuzz.random * UINT64_C(0x2545f4914f6cdd1d)) >> 33) % (n ? n : 1);
}

/* Replaces `length` bytes at `at` by others. */
static void
splice(input *in, size_t at, size_t length, const void *bytes, size_t count)
{
    length = AC_MIN(length, in->size - at);
    count = AC_MIN(count, MAX_INPUT - (in->size - length));
    memmove(in->bytes + at + count, in->bytes + at + length, in->size - at - length);
    memcpy(in->bytes + at, bytes, count);
    in->size += count - length;
}

static const char *
any_word(void)
{
    size_t n = 0;
    while (fuzz_words[n]) {
        n++;
    }
    return fuzz_words[below(n)];
}

/* The value from `at` on: up to the comma or bracket that ends it, brackets counted. */
static size_t
value_length(const input *in, size_t at)
{
    int depth = 0;
    bool quoted = false;
    for (size_t i = at; i < in->size; i++) {
        char c = (char)in->bytes[i];
        quoted = c == '"' ? !quoted : quoted;
        depth += !quoted && (c == '[' || c == '{');
        if (!quoted && depth == 0 && (c == ',' || c == ']' || c == '}')) {
            return i - at;
        }
        depth -= !quoted && (c == ']' || c == '}');
    }
    return in->size - at;
}

/* A place where a JSON value begins. */
static size_t
value_start(const input *in)
{
    size_t at = below(in->size);
    while (at < in->size && !strchr(":[,", in->bytes[at] ? in->bytes[at] : 'x')) {
        at++;
    }
    return AC_MIN(at + 1, in->size);
}

/* Keeps what was JSON JSON, mostly: other values, fewer or more fields and elements. */
static void
mutate_json(input *in)
{
    size_t at = value_start(in), length = value_length(in, at);
    const input *other = fuzz.corpus[below(fuzz.n_corpus)];
    const char *word = any_word();
    char number[32];
    switch (below(8)) {
    case 0:
    case 1:
        splice(in, at, length, word, strlen(word));
        break;
    case 2:
        snprintf(number, sizeof number, "%d", (int)below(below(2) ? 8 : 4096));
        splice(in, at, length, number, strlen(number));
        break;
    case 3: {
        size_t from = value_start(other);
        splice(in, at, length, other->bytes + from, value_length(other, from));
        break;
    }
    case 4: { /* twice: lists grow, keys repeat */
        uint8_t value[512];
        size_t n = AC_MIN(length, sizeof value - 1);
        memcpy(value, in->bytes + at, n);
        value[n++] = ',';
        splice(in, at, 0, value, n);
        break;
    }
    case 5: /* one field or element less */
        splice(in, at, length + 1, "", 0);
        break;
    default: /* the options before the first bracket */
        if (in->size > 0 && in->bytes[0] != '{' && in->bytes[0] != '[') {
            size_t n = 0;
            while (n < in->size && in->bytes[n] != '{') {
                n++;
            }
            in->bytes[below(n)] = (uint8_t)('0' + below(below(4) ? 10 : 75));
        }
    }
}

static void
mutate_bytes(input *in)
{
    static const uint8_t bytes[] = {0,   1,   0x7f, 0x80, 0xff, '"', '\\',
                                    '{', '}', '[',  ']',  '-',  '0', '9'};
    size_t at = below(in->size + 1);
    const char *word = any_word();
    const input *other = fuzz.corpus[below(fuzz.n_corpus)];
    switch (below(6)) {
    case 0:
        if (at < in->size) {
            in->bytes[at] ^= (uint8_t)(1 << below(8));
        }
        break;
    case 1:
        splice(in, at, below(2), &bytes[below(sizeof bytes)], 1);
        break;
    case 2:
        splice(in, at, 1 + below(16), "", 0);
        break;
    case 3:
        splice(in, at, 0, word, strlen(word));
        break;
    case 4: { /* the end of another input */
        size_t from = below(other->size);
        splice(in, at, in->size, other->bytes + from, other->size - from);
        break;
    }
    default:
        splice(in, at, below(64), other->bytes, AC_MIN(other->size, below(64)));
    }
}

/* Three in four stay readable, to get past the parser. */
static void
mutate(input *in)
{
    bool readable = below(4) != 0;
    for (size_t n = 1 + below(3); n > 0; n--) {
        if (readable) {
            mutate_json(in);
        } else {
            mutate_bytes(in);
        }
    }
}

/* ---- main ----------------------------------------------------------------------------------- */

static void
keep(void)
{
    if (fuzz.n_corpus < MAX_CORPUS) {
        input *copy = malloc(sizeof *copy);
        FUZZ_CHECK(copy != NULL);
        *copy = fuzz.now;
        fuzz.corpus[fuzz.n_corpus++] = copy;
    }
}

static double
now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void
fuzz_for(double seconds)
{
    double end = now_s() + seconds;
    remove(fuzz.crash_path); /* of an earlier run */
    for (size_t i = 0; fuzz_seeds[i]; i++) {
        fuzz.now.size = AC_MIN(strlen(fuzz_seeds[i]), MAX_INPUT);
        memcpy(fuzz.now.bytes, fuzz_seeds[i], fuzz.now.size);
        keep();
        if (!run(false)) {
            fprintf(stderr, "seed %zu is refused, so it leads nowhere: %s\n", i,
                    ac_error_message());
            abort();
        }
    }
    while (now_s() < end) {
        /* Half of the time the newest finds, which are the least explored. */
        size_t recent = AC_MIN(fuzz.n_corpus, (size_t)32);
        fuzz.now = *fuzz.corpus[below(2) ? below(fuzz.n_corpus)
                                         : fuzz.n_corpus - 1 - below(recent)];
        mutate(&fuzz.now);
        size_t before = n_seen;
        run(true);
        if (n_seen != before) {
            keep();
        }
    }
}

static bool
replay(const char *path)
{
    FILE *file = fopen(path, "rb");
    if (!file) {
        fprintf(stderr, "%s: cannot be opened\n", path);
        return false;
    }
    fuzz.now.size = fread(fuzz.now.bytes, 1, MAX_INPUT, file);
    fclose(file);
    printf("%s: %s\n", path, run(true) ? "accepted" : "refused");
    return true;
}

int
main(int argc, char **argv)
{
    double seconds = 15;
    int files = 0;
    const char *slash = strrchr(argv[0], '/');
    snprintf(fuzz.crash_path, sizeof fuzz.crash_path, "crash-%s", slash ? slash + 1 : argv[0]);
    fuzz.random = UINT64_C(0x9e3779b97f4a7c15);
    signal(SIGALRM, on_signal);
    signal(SIGABRT, on_signal);
    __sanitizer_set_death_callback(write_crash);
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--seconds") == 0 && i + 1 < argc) {
            seconds = atof(argv[++i]);
        } else if (strcmp(argv[i], "--seed") == 0 && i + 1 < argc) {
            fuzz.random *= 2 * strtoull(argv[++i], NULL, 10) + 1;
        } else if (!replay(argv[i])) {
            return 2;
        } else {
            files++;
        }
    }
    if (files == 0) {
        fuzz_for(seconds);
        printf("%s: %lld inputs, %lld accepted, %lld with a failed allocation, %zu kept, %zu "
               "places reached\n", fuzz.crash_path + strlen("crash-"),
               (long long)fuzz.executions, (long long)fuzz.accepted,
               (long long)fuzz.failed_allocations, fuzz.n_corpus, n_seen);
    }
    for (size_t i = 0; i < fuzz.n_corpus; i++) {
        free(fuzz.corpus[i]);
    }
    return 0;
}
