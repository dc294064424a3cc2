/* weights: bindings, checksums, derived weights, failing allocations.  Files: test_safetensors. */
#include "../../csrc/weights.h"
#include "test.h"

#include <pthread.h>

static int deleted; /* calls of count_deletion since the test began */

static void
count_deletion(void *cookie)
{
    (void)cookie;
    deleted++;
}

static void
release_block(void *self, void *data)
{
    ++*(int *)self;
    ac_free(data);
}

static ac_tensor
floats(float *data, int64_t count)
{
    return ac_tensor_of(data, AC_F32, AC_SHAPE(count));
}

static ac_weights *
new_set(void)
{
    ac_weights *weights = NULL;
    CHECK_OK(ac_weights_new(&weights));
    deleted = 0;
    return weights;
}

/* ---- bindings ------------------------------------------------------------------------------- */

static void
bind_and_rebind(void)
{
    ac_weights *w = new_set();
    float a[3] = {1, 2, 3}, b[4] = {4, 5, 6, 7};
    ac_tensor ta = floats(a, 3), tb = floats(b, 4);
    CHECK(ac_weights_find(w, "a") == NULL);
    CHECK_OK(ac_weights_set(w, "a", &ta, count_deletion, a));
    CHECK_OK(ac_weights_set(w, "b", &tb, count_deletion, b));
    CHECK_INT(ac_weights_count(w), 2);
    CHECK_STRING(ac_weights_name(w, 0), "a");
    CHECK_STRING(ac_weights_name(w, 1), "b");
    CHECK(ac_weights_find(w, "a")->data == a);
    uint64_t generation = ac_weights_generation(w);
    CHECK_INT(deleted, 0);
    CHECK_OK(ac_weights_set(w, "a", &tb, count_deletion, b));
    CHECK_INT(deleted, 1);
    CHECK(ac_weights_generation(w) > generation);
    CHECK_INT(ac_weights_count(w), 2);
    CHECK_STRING(ac_weights_name(w, 0), "a");
    CHECK(ac_weights_find(w, "a")->data == b);
    CHECK_INT(ac_weights_find(w, "a")->shape.dim[0], 4);
    ac_weights_ref(w);
    ac_weights_unref(w);
    CHECK_INT(deleted, 1);
    ac_weights_unref(w);
    CHECK_INT(deleted, 3);
    ac_weights_unref(NULL);
}

static void
many_names(void)
{
    ac_weights *w = new_set();
    float data[1000];
    char name[32];
    for (int i = 0; i < 1000; i++) {
        ac_tensor t = floats(&data[i], 1);
        snprintf(name, sizeof name, "layer.%d.weight", i);
        CHECK_OK(ac_weights_set(w, name, &t, NULL, NULL));
    }
    for (int i = 0; i < 1000; i++) {
        snprintf(name, sizeof name, "layer.%d.weight", i);
        CHECK_STRING(ac_weights_name(w, i), name);
        CHECK(ac_weights_find(w, name)->data == &data[i]);
    }
    ac_weights_unref(w);
}

static void
refused_bindings(void)
{
    ac_weights *w = new_set();
    _Alignas(8) char data[64] = {0};
    ac_tensor good = ac_tensor_of(data, AC_F32, AC_SHAPE(2, 3)), t;
#define REFUSED(name, code, message)                                                               \
    CHECK_STATUS(ac_weights_set(w, name, &t, count_deletion, NULL), code, message)
    t = good;
    REFUSED("", AC_E_INVALID, "weights: found an empty name");
    REFUSED(NULL, AC_E_INVALID, "weights: found an empty name");
    t.dtype = (ac_dtype)99;
    REFUSED("x", AC_E_DTYPE, "x: found dtype number 99");
    t = good;
    t.shape.rank = 7;
    REFUSED("x", AC_E_SHAPE, "x: found 7 dimensions, expected at most 6");
    t = good;
    t.shape.dim[1] = -3;
    REFUSED("x", AC_E_SHAPE, "x: found shape [2, -3]");
    t = ac_tensor_of(data, AC_F32, AC_SHAPE((int64_t)1 << 40, (int64_t)1 << 21));
    REFUSED("x", AC_E_SHAPE, "product fits");
    t = good;
    t.stride[0] = 4;
    REFUSED("x", AC_E_INVALID, "x: found a strided tensor, expected a contiguous one");
    t = good;
    t.data = NULL;
    REFUSED("x", AC_E_INVALID, "x: found no data");
    t.data = data + 2;
    REFUSED("x", AC_E_INVALID, "x: found float32 data at an address that is no multiple of 4");
    CHECK_INT(deleted, 9);
    CHECK_INT(ac_weights_count(w), 0);
    CHECK_OK(ac_weights_add_constant(w, "x", &good, count_deletion, NULL));
    t = good;
    CHECK_STATUS(ac_weights_add_constant(w, "x", &t, count_deletion, NULL), AC_E_FORMAT,
                 "tensor \"x\": found a second time");
    CHECK_INT(deleted, 10);
    t = ac_tensor_of(NULL, AC_F32, AC_SHAPE(3, 0));
    CHECK_OK(ac_weights_set(w, "empty", &t, NULL, NULL));
    t = ac_tensor_of(data, AC_F32, AC_SHAPE(1, 3)); /* a stride of a dimension of 1 means nothing */
    t.stride[0] = 77;
    CHECK_OK(ac_weights_set(w, "one row", &t, NULL, NULL));
    ac_weights_unref(w);
    CHECK_INT(deleted, 11);
}

static void
rename_sources(void)
{
    ac_weights *w = new_set();
    float a[1] = {1}, b[1] = {2};
    ac_tensor ta = floats(a, 1), tb = floats(b, 1);
    ac_derived *d = NULL;
    const char *source = "a";
    CHECK_OK(ac_weights_set(w, "a", &ta, NULL, NULL));
    CHECK_OK(ac_weights_set(w, "b", &tb, NULL, NULL));
    CHECK_OK(ac_weights_derived(w, "of a", &source, 1, &d));
    CHECK(!ac_weights_rename(w, "c", "d"));
    CHECK(!ac_weights_rename(w, "a", "b"));
    CHECK(!ac_weights_rename(w, "a", "a"));
    CHECK(!ac_weights_rename(w, "a", ""));
    CHECK(ac_weights_rename(w, "a", "text_model.a"));
    CHECK_STRING(d->source[0], "text_model.a");
    CHECK(ac_weights_find(w, "a") == NULL);
    CHECK(ac_weights_find(w, "text_model.a")->data == a);
    CHECK_STRING(ac_weights_name(w, 0), "text_model.a");
    CHECK_INT(ac_weights_count(w), 2);
    CHECK_OK(ac_weights_set(w, "a", &tb, NULL, NULL)); /* the old name is free again */
    CHECK_STRING(ac_weights_name(w, 2), "a");
    CHECK(ac_weights_find(w, "text_model.a")->data == a);
    for (int i = 0; i < 500; i++) { /* names that were left do not fill the map */
        CHECK(ac_weights_rename(w, i % 2 ? "y" : "b", i % 2 ? "b" : "y"));
    }
    CHECK(ac_weights_find(w, "b")->data == b);
    ac_weights_unref(w);
}

/* ---- checksum ------------------------------------------------------------------------------- */

static uint64_t
sum_of(const void *data, int64_t bytes)
{
    ac_weights *w = NULL;
    CHECK_OK(ac_weights_new(&w));
    ac_tensor t = ac_tensor_of((void *)data, AC_U8, AC_SHAPE(bytes));
    CHECK_OK(ac_weights_set(w, "x", &t, NULL, NULL));
    const char *name = "x";
    uint64_t sum = ac_weights_checksum(w, &name, 1);
    ac_weights_unref(w);
    return sum;
}

static void
checksum_every_byte(void)
{
    uint64_t random = 7;
    unsigned char data[400];
    for (size_t i = 0; i < sizeof data; i++) {
        data[i] = (unsigned char)test_random(&random);
    }
    static const int64_t sizes[] = {1, 7, 8, 63, 64, 65, 127, 128, 200, 399, 400};
    for (size_t s = 0; s < AC_ARRAY_LEN(sizes); s++) {
        uint64_t sum = sum_of(data, sizes[s]);
        for (int64_t i = 0; i < sizes[s]; i++) {
            for (int bit = 0; bit < 8; bit++) {
                data[i] ^= (unsigned char)(1 << bit);
                CHECK(sum_of(data, sizes[s]) != sum);
                data[i] ^= (unsigned char)(1 << bit);
            }
        }
        CHECK(sum_of(data, sizes[s]) == sum);
    }
    memset(data, 0, sizeof data);
    for (int64_t n = 0; n < 400; n++) { /* zeros, but more of them */
        CHECK(sum_of(data, n) != sum_of(data, n + 1));
    }
}

enum { ROWS = 64, COLUMNS = 96, N = ROWS * COLUMNS };

static float original[N], changed[N];

/* `changed` differs from `original` and its sum from `sum`; then it is `original` again. */
static void
check_changed(uint64_t sum)
{
    CHECK(memcmp(changed, original, sizeof changed) != 0);
    CHECK(sum_of(changed, sizeof changed) != sum);
    memcpy(changed, original, sizeof changed);
}

#define AT(row, column) ((row) * COLUMNS + (column))
#define FOR_EACH for (int i = 0; i < N; i++)
#define ROW (i / COLUMNS)
#define COLUMN (i % COLUMNS)

static void
checksum_signs(void)
{
    uint64_t random = 11;
    FOR_EACH {
        original[i] = (float)test_uniform(&random, -1, 1);
    }
    memcpy(changed, original, sizeof changed);
    uint64_t sum = sum_of(original, sizeof original);
    FOR_EACH {
        changed[i] = -original[i];
    }
    check_changed(sum);
    for (int column = 0; column < COLUMNS; column++) {
        FOR_EACH {
            changed[i] = COLUMN == column ? -original[i] : original[i];
        }
        check_changed(sum);
        FOR_EACH {
            changed[i] = COLUMN % 2 == 1 && COLUMN < column + 2 ? -original[i] : original[i];
        }
        check_changed(sum);
        for (int other = 0; other < COLUMNS; other++) {
            if (other != column) { /* two signs of one row: the same change in two places */
                changed[AT(5, column)] = -original[AT(5, column)];
                changed[AT(5, other)] = -original[AT(5, other)];
                check_changed(sum);
            }
        }
    }
    for (int row = 0; row < ROWS; row++) {
        FOR_EACH {
            changed[i] = ROW == row ? -original[i] : original[i];
        }
        check_changed(sum);
        FOR_EACH {
            changed[i] = ROW == row || ROW == (row + 1) % ROWS ? -original[i] : original[i];
        }
        check_changed(sum);
    }
}

/* Orders of the same values: what merging, pruning and transposing in place do. */
static void
checksum_orders(void)
{
    uint64_t random = 12;
    FOR_EACH {
        original[i] = (float)test_uniform(&random, -1, 1);
    }
    memcpy(changed, original, sizeof changed);
    uint64_t sum = sum_of(original, sizeof original);
    for (int distance = 1; distance < COLUMNS / 3; distance *= 2) {
        FOR_EACH {
            changed[i] = original[AT(ROW, COLUMN ^ distance)];
        }
        check_changed(sum);
        FOR_EACH {
            changed[i] = original[AT(ROW ^ distance, COLUMN)];
        }
        check_changed(sum);
    }
    FOR_EACH {
        changed[i] = original[N - 1 - i];
    }
    check_changed(sum);
    for (int trial = 0; trial < 2000; trial++) { /* any two elements swapped */
        int i = (int)(test_random(&random) % N), j = (int)(test_random(&random) % N);
        if (original[i] != original[j]) {
            changed[i] = original[j];
            changed[j] = original[i];
            check_changed(sum);
        }
    }
    for (double factor = 0; factor < 3; factor += 0.5) {
        FOR_EACH {
            changed[i] = factor == 1 ? 0.25f : (float)factor * original[i];
        }
        check_changed(sum);
    }
}

static void
checksum_order_and_swaps(void)
{
    ac_weights *w = new_set();
    float a[32], b[32], kept[32];
    uint64_t random = 3;
    for (int i = 0; i < 32; i++) {
        a[i] = (float)test_uniform(&random, -1, 1);
        b[i] = (float)test_uniform(&random, -1, 1);
    }
    ac_tensor ta = floats(a, 32), tb = floats(b, 32);
    CHECK_OK(ac_weights_set(w, "a", &ta, NULL, NULL));
    CHECK_OK(ac_weights_set(w, "b", &tb, NULL, NULL));
    const char *const ab[] = {"a", "b"}, *const ba[] = {"b", "a"}, *const ax[] = {"a", "x"};
    uint64_t sum = ac_weights_checksum(w, ab, 2);
    CHECK(sum == ac_weights_checksum(w, ab, 2));
    CHECK(sum != ac_weights_checksum(w, ba, 2));
    CHECK(sum != ac_weights_checksum(w, ab, 1));
    CHECK(sum != ac_weights_checksum(w, ax, 2)); /* a name that is absent is no crash */
    memcpy(kept, a, sizeof a);
    memcpy(a, b, sizeof a);
    memcpy(b, kept, sizeof a);
    CHECK(sum != ac_weights_checksum(w, ab, 2));
    ac_weights_unref(w);
}

/* ---- derived weights ------------------------------------------------------------------------ */

static ac_derived *
make(ac_weights *w, const char *key, const char *const *source, int32_t n)
{
    ac_derived *d = NULL;
    CHECK_OK(ac_weights_derived(w, key, source, n, &d));
    if (!d->data) {
        d->data = ac_malloc(16);
        CHECK(d->data != NULL);
        d->bytes = 16;
    }
    d->checksum = ac_weights_checksum(w, d->source, d->n_sources);
    d->valid = true;
    return d;
}

static void
derived_life(void)
{
    ac_weights *w = new_set();
    int released = 0;
    float a[40] = {1}, b[40] = {2}, c[40] = {3};
    ac_tensor ta = floats(a, 40), tb = floats(b, 40), tc = floats(c, 40);
    CHECK_OK(ac_weights_set(w, "a", &ta, NULL, NULL));
    CHECK_OK(ac_weights_set(w, "b", &tb, NULL, NULL));
    CHECK_OK(ac_weights_add_constant(w, "c", &tc, NULL, NULL));
    ac_weights_set_release(w, release_block, &released);
    const char *const ab[] = {"a", "b"};
    const char *const only_b[] = {"b"}, *const only_c[] = {"c"};
    ac_derived *d = NULL;
    CHECK_OK(ac_weights_derived(w, "merge(a, b)", ab, 2, &d));
    CHECK(d->data == NULL && !d->valid && d->bytes == 0);
    CHECK_STRING(d->key, "merge(a, b)");
    CHECK_INT(d->n_sources, 2);
    CHECK_STRING(d->source[1], "b");
    d = make(w, "merge(a, b)", ab, 2);
    ac_derived *e = make(w, "cast(b)", only_b, 1), *f = make(w, "cast(c)", only_c, 1);
    CHECK_INT(ac_weights_derived_count(w), 3);
    CHECK(ac_weights_derived_at(w, 0) == d && ac_weights_derived_at(w, 2) == f);
    CHECK_STATUS(ac_weights_derived(w, "cast(b)", only_c, 1, &e), AC_E_INTERNAL,
                 "cast(b): found other sources");
    e = make(w, "cast(b)", only_b, 1);

    CHECK_INT(ac_weights_check(w), 0);
    uint64_t generation = ac_weights_generation(w);
    a[39] = -0.0f; /* in place: nothing but the bytes tells */
    CHECK_INT(ac_weights_check(w), 1);
    CHECK(!d->valid && e->valid && f->valid && d->data);
    CHECK(ac_weights_generation(w) > generation);
    CHECK_INT(ac_weights_check(w), 0); /* told once */
    make(w, "merge(a, b)", ab, 2);
    b[0] = -b[0];
    CHECK_INT(ac_weights_check(w), 2);
    make(w, "merge(a, b)", ab, 2);
    make(w, "cast(b)", only_b, 1);
    CHECK_INT(ac_weights_check(w), 0);

    generation = ac_weights_generation(w);
    ac_weights_invalidate(w, "a");
    CHECK(!d->valid && e->valid && ac_weights_generation(w) > generation);
    ac_weights_invalidate(w, NULL);
    CHECK(!d->valid && !e->valid && !f->valid);
    make(w, "cast(b)", only_b, 1);
    CHECK_OK(ac_weights_set(w, "b", &tb, NULL, NULL));
    CHECK(!e->valid && e->data);

    generation = ac_weights_generation(w);
    ac_weights_drop_derived(w);
    CHECK_INT(released, 3);
    CHECK(d->data == NULL && d->bytes == 0 && ac_weights_derived_count(w) == 3);
    CHECK(ac_weights_generation(w) > generation);
    make(w, "cast(b)", only_b, 1);
    ac_weights_unref(w);
    CHECK_INT(released, 4);
}

/* ---- threads and memory --------------------------------------------------------------------- */

static void *
use_from_thread(void *context)
{
    ac_weights *w = context;
    const char *const names[] = {"a"};
    char key[32];
    for (int i = 0; i < 200; i++) {
        ac_derived *d;
        snprintf(key, sizeof key, "cast %d", i);
        if (ac_weights_derived(w, key, names, 1, &d) < 0 || ac_weights_find(w, "a") == NULL) {
            return context;
        }
        ac_weights_unref(ac_weights_ref(w));
        ac_weights_checksum(w, names, 1);
    }
    return NULL;
}

static void
threads(void)
{
    ac_weights *w = new_set();
    float a[8] = {0};
    ac_tensor t = floats(a, 8);
    CHECK_OK(ac_weights_set(w, "a", &t, NULL, NULL));
    pthread_t thread[4];
    for (int i = 0; i < 4; i++) {
        CHECK_INT(pthread_create(&thread[i], NULL, use_from_thread, w), 0);
    }
    for (int i = 0; i < 4; i++) {
        void *failed;
        pthread_join(thread[i], &failed);
        CHECK(failed == NULL);
    }
    CHECK_INT(ac_weights_derived_count(w), 200);
    ac_weights_unref(w);
}

static ac_status
fill_set(ac_weights *w)
{
    static float data[100];
    char name[32], key[32];
    for (int i = 0; i < 100; i++) {
        ac_tensor t = floats(&data[i], 1);
        snprintf(name, sizeof name, "weight %d", i);
        AC_TRY(ac_weights_set(w, name, &t, count_deletion, NULL));
        ac_derived *d;
        const char *const source[] = {name};
        snprintf(key, sizeof key, "cast %d", i);
        AC_TRY(ac_weights_derived(w, key, source, 1, &d));
        d->data = ac_malloc(8);
        if (!d->data) {
            return ac_no_memory(8);
        }
    }
    return ac_weights_rename(w, "weight 3", "other") ? AC_OK : ac_no_memory(0);
}

static ac_status
set_scenario(void *context)
{
    ac_weights *w = NULL;
    int released = 0;
    (void)context;
    AC_TRY(ac_weights_new(&w));
    ac_weights_set_release(w, release_block, &released);
    deleted = 0;
    ac_status status = fill_set(w);
    int bound = ac_weights_count(w), failed = status < 0;
    ac_weights_unref(w);
    /* Each deleter was called once, that of the refused binding too. */
    if (deleted != bound && deleted != bound + failed) {
        return ac_error(AC_E_INTERNAL, "found %d deletions of %d", deleted, bound);
    }
    return status;
}

static void
out_of_memory(void)
{
    test_oom(set_scenario, NULL);
    CHECK(test_state.oom_runs > 20);
}

TEST_MAIN(TEST(bind_and_rebind), TEST(many_names), TEST(refused_bindings), TEST(rename_sources),
          TEST(checksum_every_byte), TEST(checksum_signs), TEST(checksum_orders),
          TEST(checksum_order_and_swaps), TEST(derived_life), TEST(threads), TEST(out_of_memory))
