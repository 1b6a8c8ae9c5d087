// How the sequences of a call are dealt to threads, for kernels that walk whole sequences.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "division.h"
#include "kernels.h"
#include "sequences.h"

namespace fused_critic::cpu {

// f(walk) for every sequence, in parallel; each sequence is walked by one thread, so nothing depends on their number. `reference`: an
// operand that tells whether neighbours in memory are neighbouring sequences, which are then walked side by side. lockstep(sequences, n),
// if there is one, takes sequences along time that are many.
template <typename F, typename Lockstep>
void over_sequences(const Layout& layout, const Operand& reference, const F& f, const Lockstep& lockstep) {
  constexpr int64_t kLeastColumns = 16;  // of a thread: a cache line of float
  const Sequences seqs(layout);
  if (time_major(layout, reference)) {
    at::parallel_for(0, layout.num_seqs, std::max(kLeastColumns, kChunk / layout.seq_len), [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; s += kTile) f(SequenceWalk{s, std::min(kTile, last - s), 0, layout.seq_len, true});
    });
    return;
  }
  // A sequence that is far longer than a lane's share would keep one lane busy while the others are idle.
  constexpr bool kLockstep = !std::is_same_v<Lockstep, std::nullptr_t>;
  const Division d = divide(seqs, [&](int64_t length) { return kLockstep && seqs.count() >= kSideBySide && length * kSideBySide <= 2 * seqs.num_tokens(); });
  d.run(
      seqs, [&](int64_t s) { f(SequenceWalk{s, 1, seqs.origin(s), seqs.length(s), false}); },
      [&](const LaneSequence* sequences, int64_t n) {
        if constexpr (kLockstep) lockstep(sequences, n);
      });
}

}  // namespace fused_critic::cpu
