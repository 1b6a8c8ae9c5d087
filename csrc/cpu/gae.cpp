// GAE on the CPU: how sequences are shared among threads. What is done to a sequence depends on the shapes alone (and on cu_seqlens), so that
// its result does not depend on the number of threads.
//
// Three walks: time-major sequences are columns, walked in lock-step. Short sequences along time are walked side by side, eight at a time
// (lockstep.h), and so are all sequences in a call with options that the scan has not (has_options). The others are scanned one by one, in
// parallel within the sequence: one longer than kSpan is a chain of spans; the carry that enters a span is always its right neighbour's
// composed map applied to the carry entering there. So a lone long sequence can have its spans scanned by different threads (maps first,
// then outputs) with the same bits as one thread gives it in one pass.
#include <ATen/Parallel.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../gae.h"
#include "division.h"
#include "kernels.h"
#include "sequences.h"

namespace fused_critic::cpu {
namespace {

constexpr int64_t kSpan = 8192;        // tokens; long enough that its composed map costs nothing beside it
constexpr int64_t kColumnGrain = 16;   // sequences; at least two vectors side by side in a thread of the column walk
constexpr int64_t kShort = 128;        // tokens; a longer sequence is scanned faster than its lane of a walk is

double number_of(const Number& x, int64_t s) {
  return x.data != nullptr ? gae_kernels<double>().element({x.data, x.dtype}, s * x.seq_stride) : x.value;
}

template <typename T>
class SequenceScan {
 public:
  explicit SequenceScan(const GaeParams& p) : p_(p), seqs_(p.layout) {
    if (p.gamma.data == nullptr && p.lam.data == nullptr) shared_powers_ = powers(0);
  }

  const Sequences& sequences() const { return seqs_; }

  // The spans of a sequence are counted from its end: [end - kSpan, end), the leftmost one shorter.
  void scan(int64_t s) const {
    const GaePowers<T> powers = shared_powers_.has_value() ? *shared_powers_ : this->powers(s);
    const int64_t length = seqs_.length(s), origin = seqs_.origin(s);
    T carry = initial_carry(s, powers.gamma);
    if (length <= kSpan) {
      gae_kernels<T>().rows(p_, s, origin, 0, length, powers, carry, ScanMode::kEmit, nullptr);
      return;
    }
    for (int64_t end = length; end > 0; end -= kSpan) {
      Affine<T> map;
      gae_kernels<T>().rows(p_, s, origin, std::max<int64_t>(0, end - kSpan), end, powers, carry, ScanMode::kEmitAndAggregate, &map);
      carry = map(carry);
    }
  }

  // Sequences with their spans dealt to all threads.
  void scan_spans(const std::vector<int64_t>& sequences) const {
    struct Span {
      int64_t seq, begin, end;
      Affine<T> map;
      T carry;
    };
    std::vector<Span> spans;
    for (const int64_t s : sequences) {
      for (int64_t end = seqs_.length(s); end > 0; end -= kSpan) spans.push_back({s, std::max<int64_t>(0, end - kSpan), end, {}, T(0)});
    }
    const auto each = [&](ScanMode mode) {
      at::parallel_for(0, int64_t(spans.size()), 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          Span& x = spans[i];
          if (mode == ScanMode::kAggregate && x.begin == 0) continue;  // nobody needs the map of the leftmost span
          gae_kernels<T>().rows(p_, x.seq, seqs_.origin(x.seq), x.begin, x.end, shared_powers_.has_value() ? *shared_powers_ : powers(x.seq), x.carry, mode, &x.map);
        }
      });
    };
    each(ScanMode::kAggregate);
    for (size_t i = 0; i < spans.size(); ++i) {
      Span& x = spans[i];
      x.carry = x.end == seqs_.length(x.seq) ? initial_carry(x.seq, T(number_of(p_.gamma, x.seq))) : spans[i - 1].map(spans[i - 1].carry);
    }
    each(ScanMode::kEmit);
  }

 private:
  GaePowers<T> powers(int64_t s) const {
    return {number_of(p_.gamma, s), number_of(p_.lam, s)};
  }

  T initial_carry(int64_t s, T gamma) const {
    if (p_.next_values.data != nullptr || p_.bootstrap_values.data == nullptr) return T(0);
    return gamma * gae_kernels<T>().element(p_.bootstrap_values, s * p_.bootstrap_values.seq_stride);
  }

  const GaeParams& p_;
  const Sequences seqs_;
  std::optional<GaePowers<T>> shared_powers_;
};

// Splitting reads the inputs twice, which pays as soon as one sequence is more than a thread's share.
bool splits(const Sequences& seqs, const std::vector<int64_t>& sequences) {
  const int64_t threads = at::get_num_threads();
  if (threads == 1 || at::in_parallel_region()) return false;
  int64_t longest = 0;
  for (const int64_t s : sequences) longest = std::max(longest, seqs.length(s));
  return longest > kSpan && longest * threads > seqs.num_tokens();
}

bool has_options(const GaeParams& p) { return p.has_returns_lam || (p.mask.data != nullptr && p.mask_mode != MaskMode::kSkip); }

}  // namespace

template <typename T>
void gae(const GaeParams& p) {
  if (time_major(p.layout, p.values)) {
    // A column's result does not depend on its neighbours, so the cut may follow the threads.
    at::parallel_for(0, p.layout.num_seqs, std::max(kColumnGrain, kChunk / std::max<int64_t>(1, p.layout.seq_len)), [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; s += kTile) gae_kernels<T>().columns(p, s, std::min(kTile, last - s));
    });
    return;
  }
  const SequenceScan<T> scan(p);
  const bool options = has_options(p);
  Division d = divide(scan.sequences(), [&](int64_t length) { return options || (p.layout.num_seqs >= kSideBySide && length <= kShort); });
  if (splits(scan.sequences(), d.alone)) {
    scan.scan_spans(d.alone);
    d.alone.clear();
  }
  d.run(scan.sequences(), [&](int64_t s) { scan.scan(s); }, [&](const LaneSequence* sequences, int64_t n) { gae_kernels<T>().lockstep(p, sequences, n); });
}

template <typename T>
void gae_backward(const GaeBackwardParams& p) {
  const Sequences seqs(p.layout);
  const auto adjoint = [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) gae_kernels<T>().adjoint(p, s, seqs.origin(s), seqs.length(s));
  };
  if (!seqs.packed()) {
    at::parallel_for(0, seqs.count(), std::max<int64_t>(1, kChunk / std::max<int64_t>(1, seqs.count() > 0 ? seqs.length(0) : 0)), adjoint);
    return;
  }
  const int64_t tokens = seqs.num_tokens();
  at::parallel_for(0, std::max<int64_t>(1, tokens), kChunk, [&](int64_t begin, int64_t end) {
    adjoint(seqs.first_from(begin), end >= tokens ? seqs.count() : seqs.first_from(end));  // empty ones at the very end: in the last stretch
  });
}

template void gae<float>(const GaeParams&);
template void gae<double>(const GaeParams&);
template void gae_backward<float>(const GaeBackwardParams&);
template void gae_backward<double>(const GaeBackwardParams&);

}  // namespace fused_critic::cpu
