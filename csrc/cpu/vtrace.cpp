// V-trace on the CPU.
#include "../vtrace.h"

#include "over_sequences.h"

namespace fused_critic::cpu {

template <typename T>
void vtrace(const VTraceParams& p) {
  over_sequences(p.layout, p.values, [&](const SequenceWalk& walk) { scan_kernels<T>().vtrace(p, walk); }, nullptr);
}

template void vtrace<float>(const VTraceParams&);
template void vtrace<double>(const VTraceParams&);

}  // namespace fused_critic::cpu
