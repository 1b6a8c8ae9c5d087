// Reductions in a fixed order: the same bits on every run.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fused_critic::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) & (kWarp - 1); }

// Sums of eight values over the warp by way of shared memory: a lane receives the sum of its slot. That takes a third of the instructions
// that shuffles would. scratch: of this warp alone, kSlotScratch<T> elements, 16-byte aligned.
constexpr int kSumSlots = 8;
template <typename T>
constexpr int kSlotStride = kSumSlots + 16 / sizeof(T);  // a lane's values start at a multiple of 16 bytes, the lanes' in different banks
template <typename T>
constexpr int kSlotScratch = kSlotStride<T> * kWarp;

__device__ __forceinline__ int lane_slot() { return lane_id() % kSumSlots; }

template <typename T>
__device__ __forceinline__ T warp_sum_slots(const T (&s)[kSumSlots], T* scratch) {
  constexpr int kParts = kWarp / kSumSlots;  // lanes that share a slot, each with an equal part of the sources
#pragma unroll
  for (int i = 0; i < kSumSlots; ++i) scratch[lane_id() * kSlotStride<T> + i] = s[i];
  __syncwarp();
  const T* from = scratch + lane_id() / kSumSlots * kSlotStride<T> + lane_slot();
  T x = from[0];
#pragma unroll
  for (int i = 1; i < kWarp / kParts; ++i) x += from[i * kParts * kSlotStride<T>];
  __syncwarp();
#pragma unroll
  for (int o = kSumSlots; o < kWarp; o *= 2) x += __shfl_xor_sync(kAllLanes, x, o);
  return x;
}

__device__ __forceinline__ uint32_t warp_sum(uint32_t x) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(kAllLanes, x);
#else
#pragma unroll
  for (int o = kWarp / 2; o > 0; o /= 2) x += __shfl_xor_sync(kAllLanes, x, o);
  return x;
#endif
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

#if __CUDA_ARCH__ >= 800
// Floats in the order of integers: those of negative numbers run backwards.
__device__ __forceinline__ int flip_negative(int x) { return x ^ (x >> 31 & 0x7fffffff); }

template <>
__device__ __forceinline__ float warp_max(float x) {
  return __int_as_float(flip_negative(__reduce_max_sync(kAllLanes, flip_negative(__float_as_int(x)))));
}
#endif

// True in every thread of the block that finishes last: what the others wrote before the call is visible to it through __ldcg.
// Weak memory: a thread's writes come before its fence, that before the barrier, and the barrier before thread 0's increment; barrier and
// fence are cumulative, so whoever reads the ticket's last value is behind the writes of every thread of every block. The fence after the
// increment keeps the reads that follow from being served early, and the second barrier hands that on to the block.
// A lone block needs no ticket: its own barrier orders its writes before its reads.
__device__ __forceinline__ bool is_last_block(unsigned* ticket) {
  if (gridDim.x == 1) {
    __syncthreads();
    return true;
  }
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
