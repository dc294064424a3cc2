/* weights: name -> {shape, dtype, address} over memory that someone else owns, and the derived
 * weights that accel made from them.
 *
 * Sources borrow: from a mapped safetensors file, or from a caller's tensors with a deleter (the
 * shape DLPack has).  They may be re-bound to another address or dtype between runs; derived ones
 * remember what they were made from and are made again.  Any number of plans share one set.
 */
#ifndef AC_WEIGHTS_H
#define AC_WEIGHTS_H

#include "tensor.h"

typedef struct ac_weights ac_weights;

typedef struct ac_weight {
    const char *name;  /* as the model asks for it */
    ac_tensor tensor;  /* contiguous; data borrowed, host memory or the device's */
} ac_weight_entry;

ac_status ac_weights_new(ac_weights **out);
ac_weights *ac_weights_ref(ac_weights *weights);
void ac_weights_unref(ac_weights *weights); /* the last one calls every deleter */

/* Adds or re-binds one tensor; contiguous.  `deleter(cookie)` is called once, when the binding is
 * replaced or the set goes; also when this call fails.  Re-binding bumps the generation. */
ac_status ac_weights_set(ac_weights *weights, const char *name, const ac_tensor *tensor,
                         void (*deleter)(void *cookie), void *cookie);
/* Maps one safetensors file and adds all its tensors.  Every header fact is checked before use:
 * lengths, offsets that overlap or leave holes, dtypes, shapes against byte counts, names. */
ac_status ac_weights_add_file(ac_weights *weights, const char *path);
/* `<folder>/<stem>.safetensors`, or the shards named by `<stem>.safetensors.index.json`; with a
 * variant "fp16": `<stem>.fp16.safetensors`.  A folder with only .bin pickles is refused by name. */
ac_status ac_weights_add_folder(ac_weights *weights, const char *folder, const char *stem,
                                const char *variant);

/* NULL: absent.  The pointer is valid until the next ac_weights_set of any name. */
const ac_tensor *ac_weights_find(const ac_weights *weights, const char *name);
int32_t ac_weights_count(const ac_weights *weights);
const char *ac_weights_name(const ac_weights *weights, int32_t index); /* in order of addition */
/* Renames a source (published old names to the ones models use).  False when absent or taken. */
bool ac_weights_rename(ac_weights *weights, const char *from, const char *to);
/* Counts re-bindings: an exec compares it to know that addresses may have moved. */
uint64_t ac_weights_generation(const ac_weights *weights);
/* Sum over the bytes of the named sources, to notice in-place changes that move no counter.
 * Order of names matters; reads all bytes once (about 10 GB/s a core). */
uint64_t ac_weights_checksum(const ac_weights *weights, const char *const *names, int32_t count);

/* ---- derived weights -------------------------------------------------------------------------- */

typedef struct ac_derived {
    const char *key;           /* canonical text of what it is, e.g. "cast:f32(conv_in.weight)" */
    void *data;                /* device memory */
    size_t bytes;
    bool valid;                /* false: sources changed, make again */
    int32_t n_sources;
    const char *const *source; /* names of weights */
    uint64_t checksum;         /* of the sources when made */
} ac_derived;

/* Finds or adds the entry for `key`; a new one has data NULL and valid false.  The memory is the
 * weights' from then on: `release(device_self, data)` frees it. */
ac_status ac_weights_derived(ac_weights *weights, const char *key, const char *const *source,
                             int32_t n_sources, ac_derived **out);
void ac_weights_set_release(ac_weights *weights, void (*release)(void *self, void *data),
                            void *self);
int32_t ac_weights_derived_count(const ac_weights *weights);
const ac_derived *ac_weights_derived_at(const ac_weights *weights, int32_t index);
/* Marks as invalid what was made from `name` (NULL: everything).  Keeps the memory. */
void ac_weights_invalidate(ac_weights *weights, const char *name);
/* Compares the checksums of all derived entries' sources with those at their making; marks what
 * changed as invalid; returns how many. */
int32_t ac_weights_check(ac_weights *weights);
/* Frees the memory of all derived entries (offload); they are made again when next needed. */
void ac_weights_drop_derived(ac_weights *weights);

#endif
