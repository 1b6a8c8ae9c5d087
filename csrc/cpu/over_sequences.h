// How the sequences of a call are dealt to threads, for kernels that walk whole sequences.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "kernels.h"
#include "sequences.h"

namespace fused_critic::cpu {

// f(walk) for every sequence, in parallel; each sequence is walked by one thread, so nothing depends on their number. `reference`: an
// operand that tells whether neighbours in memory are neighbouring sequences, which are then walked side by side.
template <typename F>
void over_sequences(const Layout& layout, const Operand& reference, const F& f) {
  constexpr int64_t kLeastColumns = 16;  // of a thread: a cache line of float
  const Sequences seqs(layout);
  const auto one_by_one = [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) f(SequenceWalk{s, 1, seqs.origin(s), seqs.length(s), false});
  };
  if (time_major(layout, reference)) {
    at::parallel_for(0, layout.num_seqs, std::max(kLeastColumns, kChunk / layout.seq_len), [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; s += kTile) f(SequenceWalk{s, std::min(kTile, last - s), 0, layout.seq_len, true});
    });
  } else if (!seqs.packed()) {
    at::parallel_for(0, layout.num_seqs, std::max<int64_t>(1, kChunk / layout.seq_len), one_by_one);
  } else {
    const int64_t tokens = seqs.num_tokens();
    at::parallel_for(0, tokens, kChunk, [&](int64_t begin, int64_t end) {
      one_by_one(seqs.first_from(begin), end == tokens ? seqs.count() : seqs.first_from(end));  // empty ones at the very end: in the last stretch
    });
  }
}

}  // namespace fused_critic::cpu
