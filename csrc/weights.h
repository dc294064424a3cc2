/* weights: name -> {shape, dtype, address} over memory that someone else owns, and the derived
 * weights that accel made from them.
 *
 * Sources borrow: from a mapped safetensors file, or from a caller's tensors with a deleter (the
 * shape DLPack has).  They may be re-bound to another address or dtype between runs; derived ones
 * remember what they were made from and are made again.  Any number of plans share one set.
 *
 * Threads: every call may come from any thread; one mutex guards the tables, and deleters and
 * release() run outside it.  It does not guard the tensors' bytes or the fields of ac_derived: who
 * re-binds, drops or makes derived weights sees to it that no run reads them meanwhile.
 */
#ifndef AC_WEIGHTS_H
#define AC_WEIGHTS_H

#include "tensor.h"

typedef struct ac_weights ac_weights;

ac_status ac_weights_new(ac_weights **out);
ac_weights *ac_weights_ref(ac_weights *weights);
void ac_weights_unref(ac_weights *weights); /* the last one calls every deleter */

/* Adds or re-binds one tensor; contiguous, aligned to its dtype's size, in host memory or the
 * device's.  `deleter(cookie)` is called once, when the binding is replaced or the set goes; also
 * when this call fails.  An entry keeps its index; what was derived from it becomes invalid. */
ac_status ac_weights_set(ac_weights *weights, const char *name, const ac_tensor *tensor,
                         void (*deleter)(void *cookie), void *cookie);
/* The same for a tensor in the memory of the device that runs the models: checksums do not read it
 * (who changes it in place says so with ac_weights_invalidate), and nothing is uploaded.  A
 * rank-4 tensor may be dense in the order [o, h, w, i] (channels_last): no copy is made where a
 * kernel wants that order. */
ac_status ac_weights_set_device(ac_weights *weights, const char *name, const ac_tensor *tensor,
                                void (*deleter)(void *cookie), void *cookie);
bool ac_weights_on_device(const ac_weights *weights, const char *name);
/* Adds a tensor whose bytes never change, so that checksums read it only once.  A name that is
 * there already raises. */
ac_status ac_weights_add_constant(ac_weights *weights, const char *name, const ac_tensor *tensor,
                                  void (*deleter)(void *cookie), void *cookie);
/* Maps one safetensors file and adds all its tensors, in the header's order.  Every header fact is
 * checked before use: lengths, offsets that overlap or leave holes, dtypes, shapes against byte
 * counts, names.  Tensors at odd offsets are copied, so that all data is aligned.  A name that is
 * there already raises.  After a failure a part of the tensors may be there: drop the set.
 * The mapping lasts while a tensor of it is bound; shortening the file meanwhile is a SIGBUS. */
ac_status ac_weights_add_file(ac_weights *weights, const char *path);
/* `<folder>/<stem>.safetensors`, or the shards named by `<stem>.safetensors.index.json`; with a
 * variant "fp16": `<stem>.fp16.safetensors`.  A folder of .bin pickles alone is refused by name. */
ac_status ac_weights_add_folder(ac_weights *weights, const char *folder, const char *stem,
                                const char *variant);

/* NULL: absent.  The pointer is valid as long as the set; a re-binding changes what it shows. */
const ac_tensor *ac_weights_find(const ac_weights *weights, const char *name);
int32_t ac_weights_count(const ac_weights *weights);
const char *ac_weights_name(const ac_weights *weights, int32_t index); /* in order of addition */
/* Renames a source (published old names to the ones models use).  False when absent or taken. */
bool ac_weights_rename(ac_weights *weights, const char *from, const char *to);
/* Grows with every re-binding, invalidation and dropping: an exec compares it to know that
 * addresses or contents may have changed. */
uint64_t ac_weights_generation(const ac_weights *weights);
/* Sum over the bytes of the named sources (in host memory), to notice in-place changes that move
 * no counter.  Order of names matters; reads all bytes, those of constant ones only once. */
uint64_t ac_weights_checksum(const ac_weights *weights, const char *const *names, int32_t count);

/* ---- derived weights ------------------------------------------------------------------------- */

typedef struct ac_derived {
    const char *key;           /* canonical text of what it is, e.g. "cast:f32(conv_in.weight)" */
    void *data;                /* device memory */
    size_t bytes;
    bool valid;                /* false: sources changed, make again */
    int32_t n_sources;
    const char *const *source; /* names of weights */
    uint64_t checksum;         /* of the sources just before it was made */
    bool borrowed;             /* `data` is the sources' own memory, which has this form already */
} ac_derived;

/* Finds or adds the entry for `key`; a new one has data NULL and valid false.  The entry lives as
 * long as the set.  The memory is the weights' from then on: `release(self, data)` frees it. */
ac_status ac_weights_derived(ac_weights *weights, const char *key, const char *const *source,
                             int32_t n_sources, ac_derived **out);
/* Fails while users of another device are there: an address is good on one only. */
ac_status ac_weights_set_release(ac_weights *weights, void (*release)(void *self, void *data),
                                 void *self);
/* Each set_release is one user that may be running on derived weights; one leaves, and with the
 * last their memory goes (what releases it goes too). */
void ac_weights_leave(ac_weights *weights);
/* Around the making of derived weights: one maker at a time, and invalidate and check wait. */
void ac_weights_make_begin(ac_weights *weights);
void ac_weights_make_end(ac_weights *weights);
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
