// GAE on the CPU: how sequences are shared among threads.
//
// Time-contiguous sequences are scanned one by one. A sequence longer than kSpan is a chain of spans; the carry that enters a span is
// always its right neighbour's composed map applied to the carry entering there. So a lone long sequence can have its spans scanned by
// different threads (maps first, then outputs) with the same bits as one thread gives it in one pass.
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "../gae.h"
#include "kernels.h"
#include "sequences.h"

namespace fused_critic::cpu {
namespace {

constexpr int64_t kSpan = 8192;        // tokens; long enough that its composed map costs nothing beside it
constexpr int64_t kColumnGrain = 16;   // sequences; at least two vectors side by side in a thread of the column walk

// Runs f(first, last) over sequences in parallel, in stretches of at least kChunk tokens. Packed sequences are dealt by their tokens.
template <typename F>
void parallel_over_sequences(const Sequences& seqs, const F& f) {
  if (!seqs.packed()) {
    at::parallel_for(0, seqs.count(), std::max<int64_t>(1, kChunk / std::max<int64_t>(1, seqs.count() > 0 ? seqs.length(0) : 0)), f);
    return;
  }
  const int64_t tokens = seqs.num_tokens();
  at::parallel_for(0, std::max<int64_t>(1, tokens), kChunk, [&](int64_t begin, int64_t end) {
    f(seqs.first_from(begin), end >= tokens ? seqs.count() : seqs.first_from(end));  // empty ones at the very end: in the last stretch
  });
}

template <typename T>
T initial_carry(const GaeParams& p, int64_t s, T gamma) {
  if (p.next_values.data != nullptr || p.bootstrap_values.data == nullptr) return T(0);
  return gamma * gae_kernels<T>().element(p.bootstrap_values, s * p.bootstrap_values.seq_stride);
}

// The spans of a sequence are counted from its end: [end - kSpan, end), the leftmost one shorter.
template <typename T>
void scan_sequence(const GaeParams& p, const Sequences& seqs, int64_t s, const GaePowers<T>& powers) {
  const int64_t length = seqs.length(s), origin = seqs.origin(s);
  T carry = initial_carry<T>(p, s, powers.gamma);
  if (length <= kSpan) {
    gae_kernels<T>().rows(p, s, origin, 0, length, powers, carry, ScanMode::kEmit, nullptr);
    return;
  }
  for (int64_t end = length; end > 0; end -= kSpan) {
    Affine<T> map;
    gae_kernels<T>().rows(p, s, origin, std::max<int64_t>(0, end - kSpan), end, powers, carry, ScanMode::kEmitAndAggregate, &map);
    carry = map(carry);
  }
}

// All sequences with their spans dealt to all threads.
template <typename T>
void scan_spans(const GaeParams& p, const Sequences& seqs, const GaePowers<T>& powers) {
  struct Span {
    int64_t seq, begin, end;
    Affine<T> map;
    T carry;
  };
  std::vector<Span> spans;
  for (int64_t s = 0; s < seqs.count(); ++s) {
    for (int64_t end = seqs.length(s); end > 0; end -= kSpan) spans.push_back({s, std::max<int64_t>(0, end - kSpan), end, {}, T(0)});
  }
  const auto each = [&](ScanMode mode) {
    at::parallel_for(0, int64_t(spans.size()), 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        Span& x = spans[i];
        if (mode == ScanMode::kAggregate && x.begin == 0) continue;  // nobody needs the map of the leftmost span
        gae_kernels<T>().rows(p, x.seq, seqs.origin(x.seq), x.begin, x.end, powers, x.carry, mode, &x.map);
      }
    });
  };
  each(ScanMode::kAggregate);
  for (size_t i = 0; i < spans.size(); ++i) {
    Span& x = spans[i];
    x.carry = x.end == seqs.length(x.seq) ? initial_carry<T>(p, x.seq, powers.gamma) : spans[i - 1].map(spans[i - 1].carry);
  }
  each(ScanMode::kEmit);
}

// Splitting reads the inputs twice, which pays as soon as one sequence is more than a thread's share.
bool splits(const Sequences& seqs) {
  const int64_t threads = at::get_num_threads();
  if (threads == 1 || at::in_parallel_region()) return false;
  int64_t longest = 0;
  for (int64_t s = 0; s < (seqs.packed() ? seqs.count() : std::min<int64_t>(1, seqs.count())); ++s) longest = std::max(longest, seqs.length(s));
  return longest > kSpan && longest * threads > seqs.num_tokens();
}

}  // namespace

template <typename T>
void gae(const GaeParams& p) {
  const GaePowers<T> powers(T(p.gamma.value), T(p.gamma.value * p.lam.value));
  const Sequences seqs(p.layout);
  if (time_major(p.layout, p.values)) {
    // A column's result does not depend on its neighbours, so the cut may follow the threads.
    at::parallel_for(0, p.layout.num_seqs, std::max(kColumnGrain, kChunk / std::max<int64_t>(1, p.layout.seq_len)), [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; s += kTile) gae_kernels<T>().columns(p, s, std::min(kTile, last - s), powers);
    });
  } else if (splits(seqs)) {
    scan_spans<T>(p, seqs, powers);
  } else {
    parallel_over_sequences(seqs, [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) scan_sequence<T>(p, seqs, s, powers);
    });
  }
}

template <typename T>
void gae_backward(const GaeBackwardParams& p) {
  const Sequences seqs(p.layout);
  parallel_over_sequences(seqs, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      gae_kernels<T>().adjoint(p, s, seqs.origin(s), seqs.length(s), T(p.gamma.value), T(p.gamma.value * p.lam.value));
    }
  });
}

template void gae<float>(const GaeParams&);
template void gae<double>(const GaeParams&);
template void gae_backward<float>(const GaeBackwardParams&);
template void gae_backward<double>(const GaeBackwardParams&);

}  // namespace fused_critic::cpu
