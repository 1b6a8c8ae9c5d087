// The instruction set that every CPU of this architecture has: SSE2 on x86-64, NEON on AArch64.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels.h"

#define FUSED_CRITIC_CPU_NAMESPACE baseline
#define FUSED_CRITIC_VECTOR_BYTES 16
#define FUSED_CRITIC_FLOATS kDefaultFloats
#define FUSED_CRITIC_DOUBLES kDefaultDoubles
#include "capability_kernels.inc"
