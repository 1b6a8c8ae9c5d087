// How sequences along time are divided into work for threads: by their lengths alone, never by the number of threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "sequences.h"

namespace fused_critic::cpu {

constexpr int64_t kSideBySide = 8;   // sequences of one walk (lockstep.h)
constexpr int64_t kPackedWalk = 32;  // packed sequences in a chunk: lanes that are through early find others

// Which sequences are walked side by side, in chunks, and which are scanned alone.
struct Division {
  std::vector<int64_t> alone;
  std::vector<std::vector<LaneSequence>> chunks;

  // scan(s) of the sequences that are alone and walk(sequences, n) of the chunks, in parallel. A thread has neighbours, whose tokens stay in
  // its caches from call to call, and about as many tokens as the others.
  template <typename Scan, typename Walk>
  void run(const Sequences& seqs, const Scan& scan, const Walk& walk) const {
    const int64_t count = alone.size() + chunks.size();
    std::vector<int64_t> first_token(count + 1);
    for (int64_t i = 0; i < count; ++i) first_token[i + 1] = first_token[i] + tokens_of(seqs, i);
    const auto first_from = [&](int64_t token) { return std::lower_bound(first_token.begin(), first_token.end() - 1, token) - first_token.begin(); };
    const int64_t tokens = first_token[count];
    at::parallel_for(0, std::max<int64_t>(1, tokens), kChunk, [&](int64_t begin, int64_t end) {
      const int64_t last = end >= tokens ? count : first_from(end);  // empty ones at the very end: in the last stretch
      for (int64_t i = first_from(begin); i < last; ++i) {
        if (i < int64_t(alone.size())) {
          scan(alone[i]);
        } else {
          const auto& chunk = chunks[i - alone.size()];
          walk(chunk.data(), int64_t(chunk.size()));
        }
      }
    });
  }

 private:
  int64_t tokens_of(const Sequences& seqs, int64_t i) const {
    if (i < int64_t(alone.size())) return seqs.length(alone[i]);
    int64_t tokens = 0;
    for (const LaneSequence& s : chunks[i - alone.size()]) tokens += s.length;
    return tokens;
  }
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
