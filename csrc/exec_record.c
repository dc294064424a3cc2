/* exec_record: the step section as a recording.
 *
 *     first run over some addresses    launched
 *     second                           recorded, then replayed
 *     later                            replayed
 *
 * What a recording depends on is hashed into its key: the addresses and strides at its edges, the
 * lane's arena, the exec's own memory, the weights' generation, and what the caller adds.  A
 * recording fails when another thread waits for the whole device meanwhile, so there are some
 * attempts; after them this exec launches from then on. */
#include "exec_internal.h"

#include <stdio.h>

#define ATTEMPTS 3

void
ac_exec_forget_recording(ac_exec *e)
{
    if (e->recording) {
        e->plan->device->backend->record_free(e->plan->device->self, e->recording);
        e->recording = NULL;
    }
    e->recorded = e->seen = 0;
}

const char *
ac_exec_unrecorded(const ac_exec *e)
{
    return e->unrecorded;
}

static uint64_t
hash_edges(const ac_exec *e, uint64_t hash)
{
    for (int32_t i = 0; i < e->n_edges; i++) {
        ac_val v = e->edge_at[i];
        if (e->edges[v].step) {
            hash = ac_hash(&e->bound[v].data, sizeof e->bound[v].data, hash);
            hash = ac_hash(e->bound[v].stride, sizeof e->bound[v].stride, hash);
        }
    }
    return hash;
}

/* Never 0. */
static uint64_t
key_of(const ac_exec *e, const ac_device_lane *lane, const ac_run *run)
{
    const void *const addresses[] = {lane, e->keep, e->slots, e->extra};
    const uint64_t numbers[] = {lane->arena_id, e->generation, run->key, run->before != NULL,
                                run->after != NULL, run->tail != NULL};
    uint64_t hash = ac_hash(addresses, sizeof addresses, AC_HASH_SEED);
    return hash_edges(e, ac_hash(numbers, sizeof numbers, hash)) | 1;
}

static ac_status
replay(ac_exec *e, ac_device_lane *lane)
{
    const ac_device *device = e->plan->device;
    return device->backend->replay(device->self, lane->lane, e->recording);
}

/* Leaves e->recording NULL when it fails; nothing has run then. */
static ac_status
record(ac_exec *e, ac_device_lane *lane, const ac_run *run)
{
    const ac_device *device = e->plan->device;
    ac_recording *made = NULL;
    AC_TRY(device->backend->record_begin(device->self, lane->lane));
    char why[sizeof e->unrecorded] = ""; /* the first reason, not what it is to end such a one */
    ac_status launched = ac_exec_launch_step(e, lane, run);
    if (launched < 0) {
        snprintf(why, sizeof why, "%s", ac_error_message());
    }
    ac_status ended = device->backend->record_end(device->self, lane->lane, &made);
    if (launched < 0) {
        if (made) {
            device->backend->record_free(device->self, made);
        }
        return ac_error(launched, "%s", why);
    }
    AC_TRY(ended);
    e->recording = made;
    return AC_OK;
}

ac_status
ac_exec_step(ac_exec *e, ac_device_lane *lane, const ac_run *run)
{
    if (!e->can_record) {
        return ac_exec_launch_step(e, lane, run);
    }
    uint64_t key = key_of(e, lane, run);
    if (e->recording && e->recorded == key) {
        return replay(e, lane);
    }
    if (e->seen != key) {
        ac_exec_forget_recording(e);
        e->seen = key;
        return ac_exec_launch_step(e, lane, run);
    }
    if (record(e, lane, run) < 0) {
        e->seen = 0;
        if (++e->failed_recordings == ATTEMPTS) {
            snprintf(e->unrecorded, sizeof e->unrecorded, "%s", ac_error_message());
            ac_log(1, "recording failed, every run launches its steps: %s", e->unrecorded);
            e->can_record = false;
        }
        return ac_exec_launch_step(e, lane, run);
    }
    e->failed_recordings = 0;
    e->recorded = key;
    return replay(e, lane);
}
