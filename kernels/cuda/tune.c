/* tune: see tune.h. */
#include "tune.h"

#include "recording.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char header[] = "accel tune 1";

typedef struct entry {
    uint64_t hash; /* of the key: keys are alike for most of their length */
    char key[AC_TUNE_KEY], way[AC_TUNE_WAY];
    double microseconds;
} entry;

struct ac_tune {
    bool off, full;
    char device[64];
    char folder[560]; /* empty: no files */
    char path[600];   /* of the choices; empty: no file */
    entry *entries; /* of all devices that the file knows */
    int32_t count, capacity;
    struct stat seen; /* the file as it was read or written last */
};

void
ac_tune_free(ac_tune *tune)
{
    if (tune) {
        ac_cuda_host->free(tune->entries);
        ac_cuda_host->free(tune);
    }
}

uint64_t
ac_tune_hash(uint64_t hash, const void *bytes, size_t count)
{
    const unsigned char *at = bytes;
    for (size_t i = 0; i < count; i++) {
        hash = (hash ^ at[i]) * UINT64_C(0x100000001b3);
    }
    return hash;
}

static const entry *
find(const ac_tune *tune, const char *key)
{
    uint64_t hash = ac_tune_hash(AC_TUNE_HASH, key, strlen(key));
    for (int32_t i = 0; i < tune->count; i++) {
        if (tune->entries[i].hash == hash && strcmp(tune->entries[i].key, key) == 0) {
            return &tune->entries[i];
        }
    }
    return NULL;
}

static ac_status
add(ac_tune *tune, const entry *e)
{
    entry *to = (entry *)find(tune, e->key); /* with a way that is no more */
    if (!to) {
        AC_TRY(ac_cuda_heap_grow((void **)&tune->entries, tune->count, &tune->capacity,
                                 sizeof *e));
        to = &tune->entries[tune->count++];
    }
    *to = *e;
    to->hash = ac_tune_hash(AC_TUNE_HASH, e->key, strlen(e->key));
    return AC_OK;
}

/* ---- the file -------------------------------------------------------------------------------- */

/* "key<tab>way<tab>microseconds" */
static bool
parse(char *line, entry *e)
{
    char *way = strchr(line, '\t'), *time = way ? strchr(way + 1, '\t') : NULL, *end = NULL;
    if (!time || way - line >= AC_TUNE_KEY || time - way - 1 >= AC_TUNE_WAY) {
        return false;
    }
    *way++ = *time++ = '\0';
    memset(e, 0, sizeof *e);
    memcpy(e->key, line, (size_t)(way - line)); /* with its end */
    memcpy(e->way, way, (size_t)(time - way));
    e->microseconds = strtod(time, &end);
    return *e->key && *e->way && end != time && *end == '\n' && isfinite(e->microseconds);
}

/* Adds what the file knows and we do not.  A file that is not ours throughout says nothing. */
static ac_status
read_file(ac_tune *tune)
{
    char line[AC_TUNE_KEY + AC_TUNE_WAY + 64];
    entry e;
    int32_t before = tune->count;
    FILE *file = *tune->path ? fopen(tune->path, "re") : NULL;
    if (!file) {
        return AC_OK;
    }
    bool good = fgets(line, sizeof line, file) && strncmp(line, header, strlen(header)) == 0 &&
                line[strlen(header)] == '\n';
    ac_status status = AC_OK;
    while (good && status == AC_OK && fgets(line, sizeof line, file)) {
        good = parse(line, &e);
        status = good && !find(tune, e.key) ? add(tune, &e) : AC_OK;
    }
    fclose(file);
    if (!good) {
        tune->count = before;
        ac_cuda_log(1, "cuda: %s is damaged and was ignored", tune->path);
    }
    return status;
}

/* ~/.cache/accel is made; so is ACCEL_CACHE, its last part. */
static void
make_folders(const char *path)
{
    char folder[600];
    for (const char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        snprintf(folder, sizeof folder, "%.*s", (int)(slash - path), path);
        mkdir(folder, 0777);
    }
}

/* Remembers the file as it is now; true where it is as it was. */
static bool
is_as_seen(ac_tune *tune)
{
    struct stat before = tune->seen, now;
    if (stat(tune->path, &now) != 0) {
        return false;
    }
    tune->seen = now;
    return now.st_ino == before.st_ino && now.st_size == before.st_size &&
           now.st_mtim.tv_sec == before.st_mtim.tv_sec &&
           now.st_mtim.tv_nsec == before.st_mtim.tv_nsec;
}

/* A reader sees the old file or the new one.  What another process added meanwhile is kept, unless
 * it writes at the same moment: then it measures again. */
static ac_status
write_file(ac_tune *tune)
{
    char temporary[640];
    if (!*tune->path) {
        return AC_OK;
    }
    if (!is_as_seen(tune)) {
        AC_TRY(read_file(tune));
    }
    make_folders(tune->path);
    snprintf(temporary, sizeof temporary, "%s.%ld", tune->path, (long)getpid());
    FILE *file = fopen(temporary, "we");
    bool good = file && fprintf(file, "%s\n", header) > 0;
    for (int32_t i = 0; good && i < tune->count; i++) {
        const entry *e = &tune->entries[i];
        good = fprintf(file, "%s\t%s\t%.2f\n", e->key, e->way, e->microseconds) > 0;
    }
    good = file && fclose(file) == 0 && good;
    if (!good || rename(temporary, tune->path) != 0) {
        ac_cuda_log(1, "cuda: %s cannot be written (%s): the next process measures again",
                    tune->path, strerror(errno));
        unlink(temporary);
        *tune->path = '\0'; /* once is enough */
    } else {
        is_as_seen(tune);
    }
    return AC_OK;
}

static ac_status
open_tune(ac_cuda_libraries *libraries)
{
    static struct cudaDeviceProp properties; /* 1 KB; under the libraries' lock */
    const char *how = getenv("ACCEL_TUNE"), *cache = getenv("ACCEL_CACHE"), *home = getenv("HOME");
    int device;
    if (libraries->tune) {
        return AC_OK;
    }
    AC_CUDA(cudaGetDevice(&device));
    AC_CUDA(cudaGetDeviceProperties(&properties, device));
    AC_TRY(ac_cuda_heap(sizeof *libraries->tune, (void **)&libraries->tune));
    ac_tune *tune = libraries->tune;
    tune->off = how && strcmp(how, "off") == 0;
    tune->full = how && strcmp(how, "full") == 0;
    snprintf(tune->device, sizeof tune->device, "%.50s x%d", properties.name,
             properties.multiProcessorCount);
    if (tune->off) {
        return AC_OK;
    }
    if (cache && *cache) {
        snprintf(tune->folder, sizeof tune->folder, "%.500s", cache);
    } else if (home && *home) {
        snprintf(tune->folder, sizeof tune->folder, "%.500s/.cache/accel", home);
    }
    if (*tune->folder) {
        snprintf(tune->path, sizeof tune->path, "%s/cuda-1.txt", tune->folder);
    }
    return read_file(tune);
}

const char *
ac_tune_folder(ac_cuda_libraries *libraries, const char **device)
{
    if (open_tune(libraries) < 0 || !*libraries->tune->folder) {
        return NULL;
    }
    make_folders(libraries->tune->path);
    *device = libraries->tune->device;
    return libraries->tune->folder;
}

/* ---- measuring ------------------------------------------------------------------------------- */

enum { RUNS = 20 }; /* of a small problem, at once */

/* A stream of its own, since the caller's may be the one that cannot be captured. */
typedef struct stopwatch {
    cudaStream_t stream;
    cudaEvent_t from, to;
    const char *what; /* problem and way */
} stopwatch;

/* Some runs as one graph: launches would cost more than small kernels. */
static ac_status
record_runs(ac_lane *lane, const ac_tune_ways *ways, int32_t i, int times,
            const stopwatch *watch, cudaGraphExec_t *out)
{
    cudaGraph_t graph = NULL;
    ac_status status = AC_OK;
    AC_CUDA(cudaStreamBeginCapture(watch->stream, cudaStreamCaptureModeThreadLocal));
    ac_cuda_set_recording(lane, true);
    for (int k = 0; k < times && status == AC_OK; k++) {
        status = ways->run(ways->context, i);
    }
    ac_status ended = ac_cuda_check(cudaStreamEndCapture(watch->stream, &graph),
                                    "cudaStreamEndCapture");
    ac_cuda_set_recording(lane, false);
    status = status < 0 ? status : ended;
    if (status == AC_OK) {
        status = ac_cuda_check(cudaGraphInstantiate(out, graph, 0), "cudaGraphInstantiate");
    }
    if (graph) {
        cudaGraphDestroy(graph);
    }
    return status;
}

static ac_status
time_once(ac_lane *lane, const ac_tune_ways *ways, int32_t i, cudaGraphExec_t graph,
          const stopwatch *watch, float *milliseconds)
{
    AC_CUDA(cudaEventRecord(watch->from, watch->stream));
    if (graph) {
        AC_CUDA(cudaGraphLaunch(graph, watch->stream));
    } else {
        AC_TRY(ways->run(ways->context, i));
    }
    AC_CUDA(cudaEventRecord(watch->to, watch->stream));
    AC_TRY(ac_cuda_launched(lane, cudaEventSynchronize(watch->to), watch->what));
    AC_CUDA(cudaEventElapsedTime(milliseconds, watch->from, watch->to));
    return AC_OK;
}

/* The least of a few rounds; one that is far behind `best` gets no second one. */
static ac_status
measure(ac_lane *lane, const ac_tune_ways *ways, int32_t i, float best, const stopwatch *watch,
        float *least)
{
    cudaGraphExec_t graph = NULL;
    float once;
    *least = INFINITY;
    AC_TRY(time_once(lane, ways, i, NULL, watch, &once)); /* loads the kernel */
    AC_TRY(time_once(lane, ways, i, NULL, watch, &once));
    if (once > 0.1f && once > 1.5f * best) { /* too slow, and not because of its launch */
        *least = once;
        return AC_OK;
    }
    int times = once > 2.0f ? 1 : once > 0.2f ? 2 : RUNS;
    AC_TRY(record_runs(lane, ways, i, times, watch, &graph));
    ac_status status = time_once(lane, ways, i, graph, watch, &once);
    *least = status == AC_OK ? once / (float)times : INFINITY;
    for (int round = 0; round < 3 && status == AC_OK && *least < 1.2f * best; round++) {
        status = time_once(lane, ways, i, graph, watch, &once);
        *least = status == AC_OK ? fminf(*least, once / (float)times) : INFINITY;
    }
    cudaGraphExecDestroy(graph);
    return status;
}

/* Bytes of a key that its family has in common: the device and four words. */
static size_t
family_length(const char *key)
{
    const char *at = strstr(key, ": ");
    at = at ? at + 2 : key;
    for (int words = 0; words < 4 && *at; words++) {
        at += strcspn(at, " ");
        at += *at == ' ';
    }
    return (size_t)(at - key);
}

/* How many problems of the family are known; those done by way `name` where it is not NULL. */
static int32_t
count_family(const ac_tune *tune, const char *key, const char *name)
{
    size_t length = family_length(key);
    int32_t count = 0;
    for (int32_t i = 0; i < tune->count; i++) {
        const entry *e = &tune->entries[i];
        count += strncmp(e->key, key, length) == 0 && (!name || strcmp(e->way, name) == 0);
    }
    return count;
}

static bool
is_worth(const ac_tune *tune, const ac_tune_ways *ways, const char *key, int32_t i)
{
    enum { ALL = 12, FIRST = 8, KNOWN = 12 };
    char name[AC_TUNE_WAY];
    if (tune->full || ways->count <= ALL || i < FIRST ||
        count_family(tune, key, NULL) < KNOWN) {
        return true;
    }
    ways->name(ways->context, i, name);
    return count_family(tune, key, name) > 0;
}

static ac_status
measure_all(ac_lane *lane, const ac_tune *tune, const ac_tune_ways *ways, const char *key,
            stopwatch *watch, int32_t *best, float *least)
{
    char name[AC_TUNE_WAY], what[AC_TUNE_KEY + AC_TUNE_WAY];
    watch->what = what;
    *least = INFINITY;
    ac_status status = AC_OK, first = AC_OK;
    for (int32_t i = 0; i < ways->count; i++) {
        float time;
        if (!isinf(*least) && !is_worth(tune, ways, key, i)) {
            continue;
        }
        ways->name(ways->context, i, name);
        snprintf(what, sizeof what, "%s: %s", ways->key, name);
        status = measure(lane, ways, i, *least, watch, &time);
        first = i == 0 ? status : first;
        if (status < 0) { /* that way is out, unless it took the device with it */
            ac_cuda_log(2, "cuda: %s failed, way %d", what, (int)i);
            cudaError_t now = cudaStreamSynchronize(watch->stream);
            if (now != cudaSuccess) { /* which an inner measurement may have named already */
                return status == AC_E_DEVICE ? status : ac_cuda_launched(lane, now, what);
            }
        } else {
            ac_cuda_log(3, "cuda: %s, way %d: %.2f us", what, (int)i, 1e3 * time);
        }
        if (status == AC_OK && time < *least) {
            *least = time;
            *best = i;
        }
    }
    return isinf(*least) ? first : AC_OK;
}

static ac_status
measure_there(ac_lane *lane, const ac_tune *tune, const ac_tune_ways *ways, const char *key,
              stopwatch *watch, int32_t *best, float *least)
{
    cudaStream_t before = lane->stream;
    AC_CUDA(cudaEventCreate(&watch->from));
    AC_CUDA(cudaEventCreate(&watch->to));
    AC_CUDA(cudaStreamCreateWithFlags(&watch->stream, cudaStreamNonBlocking));
    /* What the problem reads is on its way. */
    AC_TRY(ac_cuda_launched(lane, cudaStreamSynchronize(before), "before a measurement"));
    lane->stream = watch->stream;
    ac_status status = measure_all(lane, tune, ways, key, watch, best, least);
    lane->stream = before;
    return status;
}

static ac_status
measure_new(ac_lane *lane, ac_tune *tune, const ac_tune_ways *ways, entry *e, int32_t *best)
{
    stopwatch watch = {0};
    float least = 0.0f;
    ac_status status = measure_there(lane, tune, ways, e->key, &watch, best, &least);
    if (watch.from) {
        cudaEventDestroy(watch.from);
    }
    if (watch.to) {
        cudaEventDestroy(watch.to);
    }
    if (watch.stream) {
        cudaStreamDestroy(watch.stream);
    }
    AC_TRY(status);
    ways->name(ways->context, *best, e->way);
    e->microseconds = 1e3 * least;
    ac_cuda_log(3, "cuda: %s: %s, %.1f us, of %d ways", e->key, e->way, e->microseconds,
                ways->count);
    AC_TRY(add(tune, e));
    return write_file(tune);
}

ac_status
ac_tune_choose(ac_lane *lane, ac_cuda_libraries *libraries, const ac_tune_ways *ways,
               int32_t *best)
{
    entry e = {.microseconds = 0.0};
    enum cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
    int32_t fastest = 0;
    AC_TRY(open_tune(libraries));
    ac_tune *tune = libraries->tune;
    if (tune->off || ways->count < 2) {
        *best = 0;
        return AC_OK;
    }
    snprintf(e.key, sizeof e.key, "%s: %s", tune->device, ways->key);
    const entry *known = find(tune, e.key);
    for (int32_t i = 0; known && i < ways->count; i++) {
        char name[AC_TUNE_WAY];
        ways->name(ways->context, i, name);
        if (strcmp(name, known->way) == 0) {
            *best = i;
            return AC_OK;
        }
    }
    AC_CUDA(cudaStreamIsCapturing(lane->stream, &capturing));
    if (capturing == cudaStreamCaptureStatusNone) {
        AC_TRY(measure_new(lane, tune, ways, &e, &fastest));
    }
    *best = fastest;
    return AC_OK;
}
