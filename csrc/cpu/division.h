// How sequences along time are divided into work for threads: by their lengths alone, never by the number of threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "kernels.h"
#include "sequences.h"

namespace fused_critic::cpu {

constexpr int64_t kSideBySide = 8;   // sequences of one walk (lockstep.h)
constexpr int64_t kPackedWalk = 32;  // packed sequences in a chunk: lanes that are through early find others

// Chunks differ in cost: a thread takes the next one whenever it is done with one.
template <typename F>
void parallel_over_chunks(int64_t chunks, int64_t tokens, const F& f) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>({chunks, tokens / kChunk + 1, at::get_num_threads()}), 1, [&](int64_t first, int64_t last) {
    for (; first < last; ++first) {
      for (int64_t i = next++; i < chunks; i = next++) f(i);
    }
  });
}

// Which sequences are walked side by side, in chunks, and which are scanned alone.
struct Division {
  std::vector<int64_t> alone;
  std::vector<std::vector<LaneSequence>> chunks;
};

// From long to short, roughly: by the power of two and the two bits below it.
inline void order_by_length(std::vector<LaneSequence>& sequences) {
  const auto rank = [](int64_t length) {
    if (length < 4) return int(length);
    const int power = 63 - __builtin_clzll(length);
    return power * 4 + int(length >> (power - 2) & 3);
  };
  constexpr int kRanks = 256;
  std::vector<int64_t> first(kRanks + 1);
  for (const auto& s : sequences) ++first[kRanks - rank(s.length)];
  for (int i = 1; i <= kRanks; ++i) first[i] += first[i - 1];
  std::vector<LaneSequence> ordered(sequences.size());
  for (const auto& s : sequences) ordered[first[kRanks - rank(s.length) - 1]++] = s;
  sequences = std::move(ordered);
}

// is_together: of a sequence's length.
template <typename F>
Division divide(const Sequences& seqs, const F& is_together) {
  Division d;
  const int64_t count = seqs.count();
  const auto sequence = [&](int64_t s) { return LaneSequence{s, seqs.origin(s), seqs.length(s)}; };
  if (seqs.packed()) {
    std::vector<LaneSequence> together;
    for (int64_t s = 0; s < count; ++s) {
      if (is_together(seqs.length(s))) {
        together.push_back(sequence(s));
      } else {
        d.alone.push_back(s);
      }
    }
    order_by_length(together);
    d.chunks.resize(std::max<int64_t>(1, std::min<int64_t>(together.size() / kPackedWalk, seqs.num_tokens() / kChunk)));
    for (size_t i = 0; i < together.size(); ++i) d.chunks[i % d.chunks.size()].push_back(together[i]);
  } else if (count > 0 && is_together(seqs.length(0))) {
    const int64_t rows = std::max<int64_t>(1, kChunk / std::max<int64_t>(1, seqs.length(0)) / kSideBySide) * kSideBySide;
    for (int64_t s = 0; s < count; ++s) {
      if (s % rows == 0) d.chunks.emplace_back().reserve(rows);
      d.chunks.back().push_back(sequence(s));
    }
  } else {
    for (int64_t s = 0; s < count; ++s) d.alone.push_back(s);
  }
  return d;
}

}  // namespace fused_critic::cpu
