#pragma once

#ifdef __CUDACC__
#define FUSED_CRITIC_HD __host__ __device__ __forceinline__
#else
#define FUSED_CRITIC_HD inline __attribute__((always_inline))
#endif

// For functions of a few vector registers: a call would pass them through memory.
#define FUSED_CRITIC_INLINE inline __attribute__((always_inline))
// For loops that want all vector registers for themselves.
#define FUSED_CRITIC_NOINLINE inline __attribute__((noinline))
