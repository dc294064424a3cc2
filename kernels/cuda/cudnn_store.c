/* cudnn_store: plans that were compiled at run time, kept between processes: a millisecond instead
 * of a quarter of a second.
 *
 *     ACCEL_CACHE/cudnn-<hash>.plan: a line that names problem, device, version and configuration,
 *     then the library's JSON
 *
 * A file that is not what its name promises is made again. */
#include "dnn.h"
#include "tune.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define LARGEST ((long)64 << 20) /* bytes of a file */

static void
path_of(const char *folder, const char *title, char *path, size_t size)
{
    uint64_t hash = ac_tune_hash(AC_TUNE_HASH, title, strlen(title));
    snprintf(path, size, "%s/cudnn-%016llx.plan", folder, (unsigned long long)hash);
}

static bool
read_all(const char *path, const char *title, char **text, size_t *length)
{
    size_t head = strlen(title) + 1;
    bool good = false;
    FILE *file = fopen(path, "re");
    *text = NULL;
    if (!file) {
        return false;
    }
    long size = fseek(file, 0, SEEK_END) == 0 ? ftell(file) : -1;
    rewind(file);
    if (size > (long)head && size < LARGEST && ac_cuda_heap((size_t)size, (void **)text) == AC_OK) {
        good = fread(*text, 1, (size_t)size, file) == (size_t)size &&
               memcmp(*text, title, head - 1) == 0 && (*text)[head - 1] == '\n';
    }
    fclose(file);
    *length = good ? (size_t)size - head : 0;
    return good;
}

bool
ac_dnn_store_read(const char *folder, const char *title, char **json, size_t *length)
{
    char path[700], *text;
    path_of(folder, title, path, sizeof path);
    *json = NULL;
    if (!read_all(path, title, &text, length)) {
        if (text) {
            ac_cuda_log(1, "cuda: %s is damaged and was ignored", path);
        }
        ac_cuda_host->free(text);
        return false;
    }
    memmove(text, text + strlen(title) + 1, *length);
    *json = text;
    return true;
}

/* Whole or not at all. */
void
ac_dnn_store_write(const char *folder, const char *title, const char *json, size_t length)
{
    char path[700], temporary[740];
    path_of(folder, title, path, sizeof path);
    snprintf(temporary, sizeof temporary, "%s.%ld", path, (long)getpid());
    FILE *file = fopen(temporary, "we");
    bool good = file && fprintf(file, "%s\n", title) > 0 &&
                fwrite(json, 1, length, file) == length;
    good = file && fclose(file) == 0 && good;
    if (!good || rename(temporary, path) != 0) {
        unlink(temporary);
    }
}
