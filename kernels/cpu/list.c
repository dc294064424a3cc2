/* list: see list.h.  A new kernel is one line here. */
#include "list.h"

/* name; one row a kernel, by op, then by preference */
#define KERNELS(X)                                                                                 \
    X(ac_cpu_linear_avx512)                                                                        \
    X(ac_cpu_linear_avx2)                                                                          \
    X(ac_cpu_linear_base)                                                                          \
    X(ac_cpu_linear_plain)                                                                         \
    X(ac_cpu_conv2d_avx512)                                                                        \
    X(ac_cpu_conv2d_avx2)                                                                          \
    X(ac_cpu_conv2d_base)                                                                          \
    X(ac_cpu_conv2d_plain)                                                                         \
    X(ac_cpu_up_conv2d_avx512)                                                                     \
    X(ac_cpu_up_conv2d_avx2)                                                                       \
    X(ac_cpu_up_conv2d_base)                                                                       \
    X(ac_cpu_up_conv2d_plain)                                                                      \
    X(ac_cpu_group_norm_avx512)                                                                    \
    X(ac_cpu_group_norm_avx2)                                                                      \
    X(ac_cpu_group_norm_base)                                                                      \
    X(ac_cpu_group_norm_plain)                                                                     \
    X(ac_cpu_layer_norm_avx512)                                                                    \
    X(ac_cpu_layer_norm_avx2)                                                                      \
    X(ac_cpu_layer_norm_base)                                                                      \
    X(ac_cpu_layer_norm_plain)                                                                     \
    X(ac_cpu_attention_avx512)                                                                     \
    X(ac_cpu_attention_avx2)                                                                       \
    X(ac_cpu_attention_base)                                                                       \
    X(ac_cpu_attention_plain)                                                                      \
    X(ac_cpu_activation_avx512)                                                                    \
    X(ac_cpu_activation_avx2)                                                                      \
    X(ac_cpu_activation_base)                                                                      \
    X(ac_cpu_activation_plain)                                                                     \
    X(ac_cpu_gate_avx512)                                                                          \
    X(ac_cpu_gate_avx2)                                                                            \
    X(ac_cpu_gate_base)                                                                            \
    X(ac_cpu_gate_plain)                                                                           \
    X(ac_cpu_add_avx512)                                                                           \
    X(ac_cpu_add_avx2)                                                                             \
    X(ac_cpu_add_base)                                                                             \
    X(ac_cpu_add_plain)                                                                            \
    X(ac_cpu_scale_plain)                                                                          \
    X(ac_cpu_concat_plain)                                                                         \
    X(ac_cpu_upsample_plain)                                                                       \
    X(ac_cpu_timestep_plain)                                                                       \
    X(ac_cpu_embed_plain)                                                                          \
    X(ac_cpu_select_plain)                                                                         \
    X(ac_cpu_eos_pool_plain)                                                                       \
    X(ac_cpu_to_nhwc_plain)                                                                        \
    X(ac_cpu_to_nchw_plain)                                                                        \
    X(ac_cpu_cast_avx512)                                                                          \
    X(ac_cpu_cast_avx2)                                                                            \
    X(ac_cpu_cast_base)                                                                            \
    X(ac_cpu_cast_plain)                                                                           \
    X(ac_cpu_fill_plain)                                                                           \
    X(ac_cpu_phase_weight_plain)

#define X(name) extern const ac_kernel name;
KERNELS(X)
#undef X

const ac_kernel *const ac_cpu_kernels[] = {
#define X(name) &name,
    KERNELS(X)
#undef X
    NULL,
};
