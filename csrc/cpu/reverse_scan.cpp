// The reverse scan on the CPU.
#include "../reverse_scan.h"

#include "over_sequences.h"

namespace fused_critic::cpu {

template <typename T>
void reverse_scan(const ReverseScanParams& p) {
  over_sequences(
      p.layout, p.x, [&](const SequenceWalk& walk) { scan_kernels<T>().reverse_scan(p, walk); },
      [&](const LaneSequence* sequences, int64_t n) { scan_kernels<T>().reverse_scan_lockstep(p, sequences, n); });
}

template <typename T>
void reverse_scan_backward(const ReverseScanBackwardParams& p) {
  over_sequences(
      p.layout, p.grad, [&](const SequenceWalk& walk) { scan_kernels<T>().reverse_scan_adjoint(p, walk); },
      [&](const LaneSequence* sequences, int64_t n) { scan_kernels<T>().reverse_scan_adjoint_lockstep(p, sequences, n); });
}

template void reverse_scan<float>(const ReverseScanParams&);
template void reverse_scan<double>(const ReverseScanParams&);
template void reverse_scan_backward<float>(const ReverseScanBackwardParams&);
template void reverse_scan_backward<double>(const ReverseScanBackwardParams&);

}  // namespace fused_critic::cpu
