// x86-64 with AVX2.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels.h"

#if defined(__x86_64__)

// After every standard header, so that no shared inline function is compiled for this instruction set.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2")))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif

#define FUSED_CRITIC_CPU_NAMESPACE avx2
#define FUSED_CRITIC_VECTOR_BYTES 32
#define FUSED_CRITIC_FLOATS kAvx2Floats
#define FUSED_CRITIC_DOUBLES kAvx2Doubles
#include "capability_kernels.inc"

#ifdef __clang__
#pragma clang attribute pop
#endif

#endif
