/* copy: dst = src in another dtype or layout; what cast, concat and the layout changes are made of;
 * and fill.
 *
 * The thread order is dst's, so writes are coalesced; reads are where the strides put them. */
#include "element.cuh"

struct convert {
    ac_cells to, from;
    __device__ void
    operator()(const int64_t (&at)[2]) const
    {
        ac_store(to, at[0], ac_load(from, at[1]));
    }
};

struct constant {
    ac_cells to;
    float value;
    __device__ void
    operator()(const int64_t (&at)[1]) const
    {
        ac_store(to, at[0], value);
    }
};

ac_status
ac_cuda_fill_tensor(ac_lane *lane, const ac_tensor *dst, float value)
{
    const int64_t *const strides[] = {dst->stride};
    return ac_cuda_each<1>(lane, "fill", ac_walk_of(&dst->shape, 1, strides),
                           constant{ac_cells_of(dst), value});
}

/* Integers, to a float dtype. */
struct convert_id {
    ac_cells to, from;
    __device__ void
    operator()(const int64_t (&at)[2]) const
    {
        ac_store(to, at[0], (float)ac_load_id(from, at[1]));
    }
};

/* Same dtype: bytes. */
template <typename T> struct move {
    ac_cells to, from;
    __device__ void
    operator()(const int64_t (&at)[2]) const
    {
        ((T *)to.data)[at[0]] = ((const T *)from.data)[at[1]];
    }
};

ac_status
ac_cuda_copy(ac_lane *lane, const ac_tensor *dst, const ac_tensor *src)
{
    const int64_t *const strides[] = {dst->stride, src->stride};
    ac_walk w = ac_walk_of(&dst->shape, 2, strides);
    ac_cells to = ac_cells_of(dst), from = ac_cells_of(src);
    if (dst->dtype == src->dtype) {
        switch (ac_dtype_size(dst->dtype)) {
        case 1:
            return ac_cuda_each<2>(lane, "copy", w, move<uint8_t>{to, from});
        case 2:
            return ac_cuda_each<2>(lane, "copy", w, move<uint16_t>{to, from});
        case 4:
            return ac_cuda_each<2>(lane, "copy", w, move<uint32_t>{to, from});
        default:
            return ac_cuda_each<2>(lane, "copy", w, move<uint64_t>{to, from});
        }
    }
    if (ac_dtype_is_float(src->dtype)) {
        return ac_cuda_each<2>(lane, "copy", w, convert{to, from});
    }
    return ac_cuda_each<2>(lane, "copy", w, convert_id{to, from});
}
