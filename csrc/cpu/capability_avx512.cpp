// x86-64 with AVX-512, at 256 bits: the same lanes as AVX2, with mask registers and twice the registers.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels.h"

#if defined(__x86_64__)

// After every standard header, so that no shared inline function is compiled for this instruction set.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,avx512f,avx512bw,avx512dq,avx512vl")))), apply_to = function)
#else
#pragma GCC target("avx2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=256")
#endif

#define FUSED_CRITIC_CPU_NAMESPACE avx512
#define FUSED_CRITIC_VECTOR_BYTES 32
#define FUSED_CRITIC_FLOATS kAvx512Floats
#include "capability_kernels.inc"

#ifdef __clang__
#pragma clang attribute pop
#endif

#endif
