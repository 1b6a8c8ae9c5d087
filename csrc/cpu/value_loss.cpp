// Value loss on the CPU: how the tokens are cut into chunks and tiles, and how the pieces are put together again.
//
// The cut depends on the shape alone and pieces are merged in their order, so results do not depend on the number of threads.
// Two ways to walk, chosen by what lies side by side in memory:
//   row walk     tiles run along a sequence (or over several whole short ones); chunks are stretches of the tokens in sequence order
//   column walk  ([T, B]) tiles run across sequences, and sums of a sequence are kept per column
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../value_loss.h"
#include "kernels.h"
#include "sequences.h"

namespace fused_critic::cpu {
namespace {

constexpr int64_t kNone = -1;

// A tile of the row walk: either a part of one sequence, or several whole neighbours (lines of one length when padded; packed
// neighbours are one line).
struct RowTile {
  TileSpec spec;
  int64_t first_seq, last_seq;  // inclusive
  int64_t first_token;          // in sequence order
};

// Calls visit(RowTile) for the tokens [begin, end), in order.
template <typename Visit>
void for_each_row_tile(const Layout& layout, const Sequences& seqs, int64_t begin, int64_t end, const Visit& visit) {
  int64_t s = seqs.of(begin);
  while (begin < end) {
    while (seqs.start(s + 1) <= begin) ++s;  // also over empty segments
    const int64_t seq_end = std::min(end, seqs.start(s + 1));
    const bool whole = begin == seqs.start(s) && seq_end == seqs.start(s + 1) && seq_end - begin <= kTile;
    RowTile tile;
    tile.first_seq = tile.last_seq = s;
    tile.first_token = begin;
    if (!whole) {
      const int64_t n = std::min(kTile, seq_end - begin);
      tile.spec = seqs.packed() ? TileSpec{1, n, 0, begin, false} : TileSpec{1, n, s, begin - seqs.start(s), false};
      begin += n;
    } else if (seqs.packed()) {
      const int64_t first = begin;
      while (s < layout.num_seqs && seqs.start(s + 1) <= end && seqs.start(s + 1) - first <= kTile) begin = seqs.start(++s);
      tile.last_seq = s - 1;
      tile.spec = TileSpec{1, begin - first, 0, first, false};
    } else {
      const int64_t lines = std::min((end - begin) / layout.seq_len, kTile / layout.seq_len);
      tile.spec = TileSpec{lines, layout.seq_len, s, 0, false};
      tile.last_seq = s + lines - 1;
      begin += lines * layout.seq_len;
    }
    visit(tile);
  }
}

// What a chunk knows of the sequences that it may share with its neighbours.
struct SeqPart {
  int64_t seq = kNone;
  double loss = 0, weight = 0;
  bool any = false;
};

struct Partial {
  double moments[kNumMoments] = {};
  double sum_of_seq_means = 0;
  SeqPart open[2];  // its first and its last sequence, where they go on in another chunk

  Partial() {
    moments[kValueMin] = std::numeric_limits<double>::infinity();
    moments[kValueMax] = -std::numeric_limits<double>::infinity();
  }
  void merge(const Partial& other) {
    for (int m = 0; m < kValueMin; ++m) moments[m] += other.moments[m];
    moments[kValueMin] = std::min(moments[kValueMin], other.moments[kValueMin]);
    moments[kValueMax] = std::max(moments[kValueMax], other.moments[kValueMax]);
    sum_of_seq_means += other.sum_of_seq_means;
  }
};

double inverse_or_zero(double x) { return x == 0 ? 0 : 1 / x; }

// A sequence is complete: count it, and leave its factor for backward.
void close(const ValueLossParams& p, const SeqPart& part, Partial& into) {
  if (part.any) into.moments[kSequences] += 1;
  if (p.reduction != Reduction::kSeqMeanTokenMean) return;
  const double factor = part.any ? inverse_or_zero(part.weight) : 0;
  p.residuals[kSeqScale + part.seq] = factor;
  if (part.any) into.sum_of_seq_means += part.loss * factor;
}

template <typename T>
void row_chunk(const ValueLossParams& p, const Sequences& seqs, int64_t begin, int64_t end, T low, T high, Partial& out) {
  const LossKernels<T>& kernel = loss_kernels<T>();
  // Sums of the sequences inside of a tile are taken from its tokens; a tile inside of one sequence has them in its moments. Where only the number
  // of non-empty sequences is asked for, and there is no mask, their lengths tell it.
  const bool counts_only = p.mask.data == nullptr && p.reduction != Reduction::kSeqMeanTokenMean;
  T token_loss[kTile], token_weight[kTile];
  SeqPart current;
  const auto finish = [&] {
    if (current.seq == kNone) return;
    const bool opened_before = seqs.start(current.seq) < begin, goes_on = seqs.start(current.seq + 1) > end;
    if (opened_before || goes_on) {
      out.open[opened_before ? 0 : 1] = current;
    } else {
      close(p, current, out);
    }
    current = SeqPart{};
  };
  for_each_row_tile(p.layout, seqs, begin, end, [&](const RowTile& tile) {
    const bool single = tile.first_seq == tile.last_seq;
    const bool per_sequence = !single && !counts_only, tokens = p.reduction == Reduction::kNone || per_sequence;
    const double loss_before = out.moments[kLoss], weight_before = out.moments[kWeight], tokens_before = out.moments[kTokens];
    kernel.forward(p, tile.spec, low, high, out.moments, tokens ? token_loss : nullptr, per_sequence ? token_weight : nullptr);
    if (p.reduction == Reduction::kNone) kernel.store_tokens(token_loss, p.tokens, tile.spec);
    if (single) {
      if (current.seq != tile.first_seq) {
        finish();
        current.seq = tile.first_seq;
      }
      current.loss += out.moments[kLoss] - loss_before;
      current.weight += out.moments[kWeight] - weight_before;
      current.any = current.any || out.moments[kTokens] > tokens_before;
      return;
    }
    finish();
    if (counts_only) {
      int64_t count = seqs.packed() ? 0 : tile.spec.lines;
      for (int64_t s = tile.first_seq; seqs.packed() && s <= tile.last_seq; ++s) count += seqs.length(s) > 0;
      out.moments[kSequences] += double(count);
      return;
    }
    for (int64_t s = tile.first_seq; s <= tile.last_seq; ++s) {
      SeqPart part;
      part.seq = s;
      for (int64_t i = seqs.start(s) - tile.first_token; i < seqs.start(s + 1) - tile.first_token; ++i) {
        part.loss += token_loss[i];
        part.weight += token_weight[i];
        part.any = part.any || token_weight[i] != T(0);
      }
      close(p, part, out);
    }
  });
  finish();
}

template <typename T>
Partial row_walk(const ValueLossParams& p, T low, T high) {
  const Sequences seqs(p.layout);
  const int64_t tokens = seqs.num_tokens(), chunks = (tokens + kChunk - 1) / kChunk;
  // Sequences without any position are in no tile.
  if (p.reduction == Reduction::kSeqMeanTokenMean) std::fill(p.residuals + kSeqScale, p.residuals + kSeqScale + p.layout.num_seqs, 0.0);
  std::vector<Partial> partials(chunks);
  at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) row_chunk<T>(p, seqs, c * kChunk, std::min(tokens, (c + 1) * kChunk), low, high, partials[c]);
  });
  Partial total;
  SeqPart current;
  for (const Partial& partial : partials) {
    for (const SeqPart& part : partial.open) {
      if (part.seq == kNone) continue;
      if (current.seq != part.seq) {
        if (current.seq != kNone) close(p, current, total);
        current = SeqPart{part.seq, 0, 0, false};
      }
      current.loss += part.loss;
      current.weight += part.weight;
      current.any = current.any || part.any;
    }
    total.merge(partial);
  }
  if (current.seq != kNone) close(p, current, total);
  return total;
}

// Columns of the column walk: blocks of at most kTile sequences, by blocks of time steps.
struct ColumnGrid {
  int64_t columns, steps, column_blocks, time_blocks;
  explicit ColumnGrid(const Layout& layout) {
    columns = std::min(layout.num_seqs, kTile);
    steps = std::max<int64_t>(1, kChunk / columns);
    column_blocks = (layout.num_seqs + columns - 1) / columns;
    time_blocks = (layout.seq_len + steps - 1) / steps;
  }
  int64_t chunks() const { return column_blocks * time_blocks; }

  // Calls visit(TileSpec) for the tiles of one chunk.
  template <typename Visit>
  void for_each_tile(const Layout& layout, int64_t chunk, const Visit& visit) const {
    const int64_t first_seq = chunk % column_blocks * columns, width = std::min(columns, layout.num_seqs - first_seq);
    const int64_t first_t = chunk / column_blocks * steps, last_t = std::min(layout.seq_len, first_t + steps);
    const int64_t lines_per_tile = std::max<int64_t>(1, kTile / width);
    for (int64_t t = first_t; t < last_t; t += lines_per_tile) visit(TileSpec{std::min(lines_per_tile, last_t - t), width, first_seq, t, true});
  }
};

template <typename T>
Partial column_walk(const ValueLossParams& p, T low, T high) {
  const LossKernels<T>& kernel = loss_kernels<T>();
  const ColumnGrid grid(p.layout);
  const int64_t seqs = p.layout.num_seqs, parts = grid.time_blocks * seqs;
  const bool sums = p.reduction == Reduction::kSeqMeanTokenMean, none = p.reduction == Reduction::kNone;
  std::vector<Partial> partials(grid.chunks());
  // Of each sequence within each block of time, side by side so that the loops over columns vectorise.
  std::vector<double> loss(sums ? parts : 0), weight(sums ? parts : 0);
  std::vector<uint8_t> any(parts);
  at::parallel_for(0, grid.chunks(), 1, [&](int64_t first, int64_t last) {
    T token_loss[kTile], token_weight[kTile];
    for (int64_t c = first; c < last; ++c) {
      grid.for_each_tile(p.layout, c, [&](const TileSpec& tile) {
        kernel.forward(p, tile, low, high, partials[c].moments, sums || none ? token_loss : nullptr, token_weight);
        if (none) kernel.store_tokens(token_loss, p.tokens, tile);
        const int64_t at = c / grid.column_blocks * seqs + tile.first_seq;
        for (int64_t l = 0; l < tile.lines; ++l) {
          const T* w = token_weight + l * tile.length;
          for (int64_t i = 0; i < tile.length; ++i) any[at + i] |= uint8_t(w[i] != T(0));
          if (!sums) continue;
          for (int64_t i = 0; i < tile.length; ++i) loss[at + i] += double(token_loss[l * tile.length + i]);
          for (int64_t i = 0; i < tile.length; ++i) weight[at + i] += double(w[i]);
        }
      });
    }
  });
  Partial total;
  for (const Partial& partial : partials) total.merge(partial);
  for (int64_t s = 0; s < seqs; ++s) {
    SeqPart sum;
    sum.seq = s;
    for (int64_t i = s; i < parts; i += seqs) {
      sum.any = sum.any || any[i];
      if (!sums) continue;
      sum.loss += loss[i];
      sum.weight += weight[i];
    }
    close(p, sum, total);
  }
  return total;
}

}  // namespace

template <typename T>
void value_loss(const ValueLossParams& p) {
  const T low = T(p.clip_low.value), high = T(p.clip_high.value);
  const Partial total = time_major(p.layout, p.values) ? column_walk<T>(p, low, high) : row_walk<T>(p, low, high);
  std::copy(total.moments, total.moments + kNumMoments, p.stats);

  double sum = total.moments[kLoss], denominator = 1;
  switch (p.reduction) {
    case Reduction::kTokenMean: denominator = p.has_count ? p.count.value : total.moments[kWeight]; break;
    case Reduction::kTokenSum: case Reduction::kNone: break;
    case Reduction::kSeqMeanTokenMean: sum = total.sum_of_seq_means; [[fallthrough]];
    case Reduction::kSeqMeanTokenSum: case Reduction::kSeqMeanTokenSumNorm: denominator = p.has_count ? p.count.value : total.moments[kSequences]; break;
  }
  const double scale = p.factor * inverse_or_zero(denominator);
  p.residuals[kScale] = scale;
  p.residuals[kClipLow] = p.clip_low.value;
  p.residuals[kClipHigh] = p.clip_high.value;
  if (p.options.clamp) *p.clamp_residual = p.loss_clamp.value;
  if (p.reduction != Reduction::kNone) *static_cast<T*>(p.loss) = scale == 0 ? T(0) : T(sum * scale);
}

template <typename T>
void value_loss_backward(const ValueLossBackwardParams& p) {
  const LossKernels<T>& kernel = loss_kernels<T>();
  const T low = T(p.residuals[kClipLow]), high = T(p.residuals[kClipHigh]);
  const double scale = p.residuals[kScale];
  const double* seq_scale = p.seq_scale ? p.residuals + kSeqScale : nullptr;
  if (time_major(p.layout, p.values)) {
    const ColumnGrid grid(p.layout);
    at::parallel_for(0, grid.chunks(), 1, [&](int64_t first, int64_t last) {
      T factor[kTile];
      for (int64_t c = first; c < last; ++c) {
        grid.for_each_tile(p.layout, c, [&](const TileSpec& tile) {
          for (int64_t i = 0; seq_scale != nullptr && i < tile.lines * tile.length; ++i) factor[i] = T(seq_scale[tile.first_seq + i % tile.length]);
          kernel.backward(p, tile, low, high, scale, seq_scale != nullptr ? factor : nullptr);
        });
      }
    });
    return;
  }
  const Sequences seqs(p.layout);
  const int64_t tokens = seqs.num_tokens(), chunks = (tokens + kChunk - 1) / kChunk;
  at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    T factor[kTile];
    for_each_row_tile(p.layout, seqs, first * kChunk, std::min(tokens, last * kChunk), [&](const RowTile& tile) {
      if (seq_scale == nullptr || tile.first_seq == tile.last_seq) {
        return kernel.backward(p, tile.spec, low, high, seq_scale != nullptr ? scale * seq_scale[tile.first_seq] : scale, nullptr);
      }
      for (int64_t s = tile.first_seq; s <= tile.last_seq; ++s) {
        const int64_t size = tile.spec.lines * tile.spec.length;
        const int64_t from = std::max<int64_t>(0, seqs.start(s) - tile.first_token), to = std::min(size, seqs.start(s + 1) - tile.first_token);
        std::fill(factor + from, factor + to, T(seq_scale[s]));
      }
      kernel.backward(p, tile.spec, low, high, scale, factor);
    });
  });
}

template void value_loss<float>(const ValueLossParams&);
template void value_loss<double>(const ValueLossParams&);
template void value_loss_backward<float>(const ValueLossBackwardParams&);
template void value_loss_backward<double>(const ValueLossBackwardParams&);

}  // namespace fused_critic::cpu
