// Reductions in a fixed order: the same bits on every run.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fused_critic::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) & (kWarp - 1); }

// Slots [0, 2 kHalf) become slots [0, kHalf): the two halves of every 4 kHalf lanes exchange what the other keeps.
template <int kHalf, typename T, int kSlots>
__device__ __forceinline__ void fold_slots(T (&s)[kSlots]) {
  const bool upper = (lane_id() & (2 * kHalf)) != 0;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    if (i + kHalf < kSlots) {
      const T keep = upper ? s[i + kHalf] : s[i];
      const T send = upper ? s[i] : s[i + kHalf];
      s[i] = keep + __shfl_xor_sync(kAllLanes, send, 2 * kHalf);
    } else {
      s[i] += __shfl_xor_sync(kAllLanes, s[i], 2 * kHalf);
    }
  }
}

constexpr int kMaxSlots = kWarp / 2;
__device__ __forceinline__ int slot_lane(int slot) { return 2 * slot; }
__device__ __forceinline__ int lane_slot() { return lane_id() / 2; }

// Sums of up to 16 values over the warp, transposed: the lanes 2 k and 2 k + 1 receive the sum of slot k.
// Halving the values per lane at every step takes about 4 * kSlots instructions in place of 10 * kSlots.
template <typename T, int kSlots>
__device__ __forceinline__ T warp_sum_slots(T (&s)[kSlots]) {
  static_assert(kSlots > kMaxSlots / 2 && kSlots <= kMaxSlots, "four halvings: 16 slots, of which the last may be missing");
  fold_slots<8>(s);
  fold_slots<4>(s);
  fold_slots<2>(s);
  fold_slots<1>(s);
  return s[0] + __shfl_xor_sync(kAllLanes, s[0], 1);
}

// Sum over each aligned group of `lanes` lanes (a power of two), in every lane of the group.
template <typename T>
__device__ __forceinline__ T group_sum(T x, int lanes) {
  for (int o = lanes / 2; o > 0; o /= 2) x += __shfl_xor_sync(kAllLanes, x, o);
  return x;
}

template <typename T>
__device__ __forceinline__ T warp_max(T x) {
#pragma unroll
  for (int o = kWarp / 2; o > 0; o /= 2) {
    const T y = __shfl_xor_sync(kAllLanes, x, o);
    x = y > x ? y : x;
  }
  return x;
}

// True in every thread of the block that finishes last: what the others wrote before the call is visible to it through __ldcg.
__device__ __forceinline__ bool is_last_block(unsigned* ticket) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

}  // namespace fused_critic::cuda
