/* kernel: the contract a kernel meets.
 *
 * A kernel is one const struct in its own file; what it supports stands beside how it does it.
 * ac_problem has four uses: argument of supports(), key of the tune cache, test case, benchmark
 * row.  Lists are ordered by preference, the plain reference last; the plan takes the first that
 * supports the problem.
 */
#ifndef AC_KERNEL_H
#define AC_KERNEL_H

#include "ops.h"

typedef struct ac_lane ac_lane; /* the backend's: pool or stream */

/* One op on concrete operands.  At plan time every data pointer is NULL; at launch they are set.
 * An absent optional operand has shape.rank == -1.  Operands may be strided views; kernels state
 * in supports() what they need. */
typedef struct ac_problem {
    ac_op op;
    ac_attr attr;
    int32_t n_inputs;
    ac_tensor *input;
    ac_tensor output;
    bool tf32; /* f32: what is multiplied may be rounded to TF32 */
} ac_problem;

static inline const ac_tensor *
ac_operand(const ac_problem *p, int32_t slot)
{
    return slot < p->n_inputs && p->input[slot].shape.rank >= 0 ? &p->input[slot] : NULL;
}

/* What a device can do, filled by its backend. */
typedef struct ac_caps {
    int32_t isa;     /* CPU: AC_ISA_*; CUDA: compute capability, 90 */
    int32_t workers; /* CPU threads; CUDA: multiprocessors */
    bool tf32;       /* has products of f32 rounded to TF32 */
    /* What it reaches in practice, 0: not known.  FLOP/s in f16 and bf16, and in f32; bytes/s. */
    double half_flops, float_flops, bandwidth;
} ac_caps;

enum { AC_ISA_BASE, AC_ISA_AVX2, AC_ISA_AVX512 };

#define AC_FORM_OHWI "ohwi"

typedef struct ac_kernel {
    const char *name; /* "cpu.group_norm.plain" */
    ac_op op;
    bool (*supports)(const ac_problem *p, const ac_caps *caps);
    /* Bytes of scratch shared by one launch, placed by the planner; NULL: none. */
    size_t (*scratch)(const ac_problem *p, const ac_caps *caps);
    /* CPU: bytes of scratch of each thread; NULL: none. */
    size_t (*worker_scratch)(const ac_problem *p, const ac_caps *caps);
    /* Weights in the kernel's own form: bytes, and the making.  NULL: uses them as they are.  The
     * result is a derived weight, shared by all plans and remade when its sources change. */
    size_t (*prepared_bytes)(const ac_problem *p, const ac_caps *caps);
    ac_status (*prepare)(ac_lane *lane, const ac_problem *p, void *prepared);
    /* Name of that form where several kernels have it in common; NULL: this kernel's own.
     * AC_FORM_OHWI: [o, i, h, w] in the order o, h, w, i, so that a weight of these strides
     * (PyTorch: channels_last) serves as it is.  A launch reads the prepared form, never the
     * weight. */
    const char *form;
    ac_status (*launch)(ac_lane *lane, const ac_problem *p, void *scratch, const void *prepared);
} ac_kernel;

#endif
