// Where sequences lie, for the drivers.
#pragma once

#include <cstdint>

#include "../params.h"

namespace fused_critic::cpu {

// Numbers the tokens sequence by sequence, padded or packed alike. cu_seqlens is valid on the CPU (the host layer checks it).
class Sequences {
 public:
  explicit Sequences(const Layout& layout) : layout_(layout) {}
  bool packed() const { return layout_.cu_seqlens != nullptr; }
  int64_t count() const { return layout_.num_seqs; }
  int64_t num_tokens() const { return packed() ? layout_.seq_len : layout_.num_seqs * layout_.seq_len; }
  int64_t start(int64_t s) const {
    if (!packed()) return s * layout_.seq_len;
    return layout_.cu_seqlens_dtype == DType::kInt32 ? static_cast<const int32_t*>(layout_.cu_seqlens)[s] : static_cast<const int64_t*>(layout_.cu_seqlens)[s];
  }
  int64_t length(int64_t s) const { return start(s + 1) - start(s); }
  // Where the operands of a sequence start: at s * seq_stride + origin(s) * time_stride (packed operands have seq_stride 0).
  int64_t origin(int64_t s) const { return packed() ? start(s) : 0; }

  // The first sequence that starts at `token` or later; count() if none does.
  int64_t first_from(int64_t token) const {
    int64_t low = 0, high = count();
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (start(middle) < token) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
  // The sequence that holds `token`.
  int64_t of(int64_t token) const { return packed() ? first_from(token + 1) - 1 : token / layout_.seq_len; }

 private:
  const Layout& layout_;
};

// Whether neighbours in memory belong to neighbouring sequences ([T, B]) rather than to one sequence.
inline bool time_major(const Layout& layout, const Operand& values) {
  return layout.cu_seqlens == nullptr && values.time_stride != 1 && values.seq_stride == 1 && layout.num_seqs > 1;
}

}  // namespace fused_critic::cpu
