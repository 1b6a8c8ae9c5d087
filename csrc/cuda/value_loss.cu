// Masked clipped value loss on CUDA: one launch forward, one backward.
//
// Forward reads every operand once and writes nothing per token (13 bytes per token for float and a one-byte mask; kNone adds one
// store); backward reads the same and writes the gradient. Results are deterministic: partial results are combined in index order by
// the block that finishes last, there is no floating-point atomic, and the split of the work depends on the shape alone.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <utility>

#include "../math/value_loss.h"
#include "launch.h"
#include "packed.cuh"
#include "reduce.cuh"

namespace fused_critic::cuda {
namespace {

// --- geometry ----------------------------------------------------------------------------------------------------------------

struct Geometry {
  static constexpr int kMaxThreads = 128;        // three such blocks per multiprocessor: 168 registers, no spills, 80 KB in flight
  static constexpr int kMinThreads = 64;         // small problems: smaller blocks reach more multiprocessors
  static constexpr int64_t kWarpTokens = 1024;   // below this a warp's reduction costs more than its tokens
  static constexpr int64_t kMaxWarps = 2048;     // fills the largest GPUs; more would only lengthen the finish
  static constexpr int64_t kSplitWarps = 2048;   // with fewer rows than half of this, rows are split until this many warps have work
  static constexpr int64_t kManyBlocks = 256;    // blocks grow from the least to the greatest size beyond this many
  static constexpr int kMinLanes = 8;            // a group's mask bytes fill a 32-byte sector
  static constexpr int kFlushPasses = 8;         // sums stay in T for this many passes (128 tokens per lane of float), then go to double
  static constexpr int64_t kMaxPart = 1 << 30;   // positions inside a part are int
  static constexpr int kBackwardThreads = 128;   // one pass per warp; small blocks balance best
};
static_assert(Geometry::kMaxThreads % kWarp == 0 && Geometry::kMinThreads % kWarp == 0, "whole warps");

// Packs that one thread has in flight: as many as leave the sums in registers. Columns keep sums for kVec rows, double needs twice the
// registers.
template <typename T, int kRows = 1>
constexpr int kPacks = sizeof(T) == sizeof(float) ? (kRows == 1 ? 4 : 2) : (kRows == 1 ? 2 : 1);
static_assert(Geometry::kFlushPasses * kPacks<float> < 256, "tokens per column are counted in bytes between two flushes");

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline int pow2_ceil(int64_t x, int limit) {
  int p = 1;
  while (p < x && p < limit) p *= 2;
  return p;
}

// --- sums --------------------------------------------------------------------------------------------------------------------

// The sums that a thread keeps: the additive moments under their own index, and one more.
constexpr int kRowMeans = kValueMin;  // sum over rows of row loss / row weight; shares no storage with the min, which is no sum
constexpr int kNumSums = kRowMeans + 1;
static_assert(kNumSums <= kMaxSlots && kSequences + 1 == kRowMeans, "additive moments first");

// What one block leaves for the finish.
struct BlockPartial {
  double sum[kMaxSlots];  // [0, kNumSums), then at kPartialMin and kPartialMax the negated min, and the max
};
constexpr int kPartialMin = kNumSums, kPartialMax = kNumSums + 1;
static_assert(kPartialMax < kMaxSlots, "a partial is 128 bytes: one slot per two lanes");

// What one part of a row that is split over warps or blocks leaves for the finish: one 16-byte access for float.
template <typename T>
struct alignas(4 * sizeof(T)) RowPartial {
  T loss, weight, seen, unused;
};

// Sums of one thread since the last flush. Values are centred on one valid token of the warp, so that second moments in T keep their
// digits. kRows: rows that a thread works on at a time (1 along time, kVec across sequences).
template <typename T, int kRows>
struct Sums {
  T sum[kNumSums] = {};
  T loss[kRows] = {}, weight[kRows] = {};          // of the current row, since the last settle
  T row_loss[kRows] = {}, row_weight[kRows] = {};  // of the current row, settled
  uint32_t tokens = 0;                             // tokens with w != 0 since the last settle, one byte per element of the pack
  uint32_t seen = 0;                               // the same bytes, or-ed over the row
  uint32_t clipped_outside = 0;                    // weights 0 and 1: clipped tokens in the low half, outside ones in the high half
  T value_min = T(INFINITY), value_max = T(-INFINITY);
  T centre_value = 0, centre_return = 0;
  bool centred = false;
};
constexpr uint32_t kOutsideOne = 1u << 16, kClippedOne = 1u;

// One pack into the sums. valid: a byte of 0 or 1 per token; kAll: all are 1 in the whole warp, which saves a fifth of the instructions
// in the usual case of long runs of valid tokens. Returns w l.
template <bool kClip, bool kWeighted, bool kAll, typename T, int kRows>
__device__ __forceinline__ Pack<T> accumulate(Sums<T, kRows>& a, const Pack<T>& values, const Pack<T>& old_values, const Pack<T>& returns,
                                              const Pack<T>& weights, uint32_t valid, T low, T high) {
  Pack<T> out;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const int row = i % kRows;
    const bool on = kAll || (valid & 1u << (8 * i)) != 0;
    const T w = kWeighted ? weights.v[i] : T(1);
    // Masked tokens stand on the centre: they add 0 to every moment whatever memory holds.
    const T v = on ? values.v[i] : a.centre_value;
    const T ret = on ? returns.v[i] : a.centre_return;
    const TokenLoss<T> token = kClip ? clipped_value_loss(v, old_values.v[i], ret, low, high) : plain_value_loss(v, ret);
    out.v[i] = on ? (kWeighted ? w * token.loss : token.loss) : T(0);
    a.loss[row] += out.v[i];
    if constexpr (kWeighted) {
      a.weight[row] += on ? w : T(0);
      a.sum[kClipped] += on && token.clipped ? w : T(0);
      a.sum[kOutside] += on && token.outside ? w : T(0);
    } else if constexpr (kClip) {
      // A clipped token is outside, too.
      a.clipped_outside += on && token.outside ? kOutsideOne + (token.clipped ? kClippedOne : 0u) : 0u;
    }
    const T dv = v - a.centre_value, dr = ret - a.centre_return, de = dr - dv;
    const T wdv = kWeighted && on ? w * dv : dv, wdr = kWeighted && on ? w * dr : dr, wde = kWeighted && on ? w * de : de;
    a.sum[kValue] += wdv;
    a.sum[kValueSq] += wdv * dv;
    a.sum[kReturn] += wdr;
    a.sum[kReturnSq] += wdr * dr;
    a.sum[kErrorSq] += wde * de;
    a.value_min = fmin(v, a.value_min);
    a.value_max = fmax(v, a.value_max);
  }
  return out;
}

// Moves what the current rows gathered since the last settle into the sums.
template <typename T, int kRows>
__device__ __forceinline__ void settle(Sums<T, kRows>& a, bool weighted) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    uint32_t n = 0;
#pragma unroll
    for (int i = r; i < kVec; i += kRows) n += a.tokens >> (8 * i) & 0xffu;
    a.sum[kTokens] += static_cast<T>(n);
    const T w = weighted ? a.weight[r] : static_cast<T>(n);
    a.sum[kWeight] += w;
    a.sum[kLoss] += a.loss[r];
    a.row_weight[r] += w;
    a.row_loss[r] += a.loss[r];
    a.weight[r] = a.loss[r] = T(0);
  }
  a.tokens = 0;
}

// Adds the warp's settled sums to `total`: the lanes 2 k and 2 k + 1 hold sum k. Undoes the centring in double.
template <typename T, int kRows>
__device__ __forceinline__ void flush(Sums<T, kRows>& a, double& total, bool weighted) {
  if (!weighted) {
    a.sum[kClipped] = static_cast<T>(a.clipped_outside & (kOutsideOne - 1));
    a.sum[kOutside] = static_cast<T>(a.clipped_outside / kOutsideOne);
    a.clipped_outside = 0;
  }
  a.sum[kError] = a.sum[kReturn] - a.sum[kValue];
  const double s = warp_sum_slots(a.sum);
  const int slot = lane_slot();
  const bool value = slot == kValue || slot == kValueSq, error = slot == kError || slot == kErrorSq;
  const bool ret = slot == kReturn || slot == kReturnSq;
  const bool square = slot == kValueSq || slot == kReturnSq || slot == kErrorSq;
  const double weight = __shfl_sync(kAllLanes, s, slot_lane(kWeight));
  const double first = __shfl_sync(kAllLanes, s, slot_lane(error ? kError : ret ? kReturn : kValue));
  const double cv = a.centre_value, cr = a.centre_return;
  const double centre = error ? cr - cv : ret ? cr : cv;
  total += s;
  if (value || ret || error) total += square ? centre * (2 * first + centre * weight) : centre * weight;
#pragma unroll
  for (int i = 0; i < kNumSums; ++i) a.sum[i] = T(0);
}

// Sum over rows of what the row's own weight divides. An empty row counts for nothing.
template <typename T>
__device__ __forceinline__ void end_row(const ValueLossParams& p, int64_t row, T loss, T weight, bool seen, T& sequences, T& row_means) {
  sequences += seen ? T(1) : T(0);
  if (p.reduction != Reduction::kSeqMeanTokenMean) return;
  row_means += weight != T(0) ? loss / weight : T(0);
  p.residuals[kSeqScale + row] = weight != T(0) ? 1.0 / static_cast<double>(weight) : 0.0;
}

// --- loading a group of packs ------------------------------------------------------------------------------------------------

enum TensorBit : unsigned { kValuesBit = 1, kOldValuesBit = 2, kReturnsBit = 4, kMaskBit = 8, kOutputBit = 16, kGradBit = 32 };

// How the tensors of a launch may be accessed, by TensorBit. Anything else goes element by element.
struct Access {
  unsigned aligned = 0;  // as vectors of their own type
  unsigned native = 0;   // of these: the accumulation type (the mask: bytes)
  unsigned half = 0;     // of these: a 2-byte floating type
};

__host__ __device__ constexpr bool is_floating(DType t) {
  return t == DType::kFloat64 || t == DType::kFloat32 || t == DType::kBFloat16 || t == DType::kFloat16;
}

template <typename T>
constexpr DType accumulation_dtype = sizeof(T) == sizeof(float) ? DType::kFloat32 : DType::kFloat64;

// Where a thread's packs lie: pack k starts at token `time` + k * time_step of sequence `seq`. Its elements follow each other along
// time, or, in columns, across sequences, seq_step apart.
template <bool kColumns>
struct Place {
  int64_t seq, time;
  int time_step, seq_step;

  template <typename X>
  __device__ __forceinline__ int64_t offset(const X& x, int k) const {
    return seq * x.seq_stride + (time + k * time_step) * x.time_stride;
  }
  template <typename X>
  __device__ __forceinline__ int64_t element_stride(const X& x) const { return kColumns ? seq_step * x.seq_stride : x.time_stride; }
  // The same two for a tensor whose packs are vectors: one of its strides is 1.
  template <typename X>
  __device__ __forceinline__ int64_t vector_offset(const X& x) const {
    return kColumns ? seq + time * x.time_stride : seq * x.seq_stride + time;
  }
  template <typename X>
  __device__ __forceinline__ int64_t vector_stride(const X& x) const { return kColumns ? time_step * x.time_stride : time_step; }

  // The same place, of which the compiler knows nothing: keeps the addresses of rare paths from being computed ahead of the loop, where
  // they would take some thirty registers from the common path.
  __device__ __forceinline__ Place rare() const {
    Place at = *this;
    asm volatile("" : "+l"(at.seq), "+l"(at.time), "+r"(at.time_step), "+r"(at.seq_step));
    return at;
  }
};

// First half of a load: issues the loads of all packs of one operand. full: every element of every pack is live. Then 2-byte elements
// stay as they are, in the low half of the pack, until widen().
template <typename T, int K, bool kColumns>
__device__ __forceinline__ void issue(Pack<T> (&out)[K], const Operand& x, const Place<kColumns>& at, const unsigned (&live)[K], bool full,
                                      const Access& access, unsigned bit) {
  if (full && (access.native & bit) != 0) {
    const T* data = static_cast<const T*>(x.data) + at.vector_offset(x);
#pragma unroll
    for (int k = 0; k < K; ++k) out[k] = load_vector(data + k * at.vector_stride(x));
  } else if (sizeof(T) == sizeof(float) && full && (access.half & bit) != 0) {
    const uint16_t* data = static_cast<const uint16_t*>(x.data) + at.vector_offset(x);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const float2 u = __ldg(reinterpret_cast<const float2*>(data + k * at.vector_stride(x)));
      out[k].v[0] = u.x, out[k].v[1] = u.y;
    }
  } else {
    const Place<kColumns> rare = at.rare();
    const bool vec = (access.aligned & bit) != 0;
#pragma unroll
    for (int k = 0; k < K; ++k) out[k] = unpack(fetch<T>(x, rare.offset(x, k), rare.element_stride(x), live[k], vec), x.dtype);
  }
}

// Second half.
template <typename T, int K>
__device__ __forceinline__ void widen(Pack<T> (&out)[K], const Operand& x, bool full, const Access& access, unsigned bit) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (!full || (access.half & bit) == 0) return;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const RawPack<T> raw = {{__float_as_uint(out[k].v[0]), __float_as_uint(out[k].v[1])}};
      out[k] = x.dtype == DType::kBFloat16 ? unpack(raw, DType::kBFloat16) : unpack(raw, DType::kFloat16);
    }
  }
}

// The weights of pack k in T, integers as 0 or 1; read where they are used (a floating mask is rare, and the line is in cache): kept,
// they would cost every launch registers.
template <typename T, typename Params, bool kColumns>
__device__ __forceinline__ Pack<T> load_weights(const Params& p, const Place<kColumns>& at, int k, unsigned live, const Access& access) {
  const Place<kColumns> rare = at.rare();
  const bool vec = (access.aligned & kMaskBit) != 0;
  return unpack(fetch<T>(p.mask, rare.offset(p.mask, k), rare.element_stride(p.mask), live, vec), p.mask.dtype);
}

constexpr uint32_t kAllValid = 0x01010101u;

// The operands of a thread's packs; an absent mask is all ones.
template <typename T, bool kClip, int K>
struct Tokens {
  Pack<T> values[K], old_values[K], returns[K];
  uint32_t valid[K];   // a byte of 0 or 1 per token
  bool weighted;

  // full: every token of every pack is live. All loads are issued before the first is used.
  template <typename Params, bool kColumns>
  __device__ __forceinline__ Tokens(const Params& p, const Place<kColumns>& at, const unsigned (&live)[K], bool full,
                                    const Access& access) {
    weighted = p.mask.data != nullptr && is_floating(p.mask.dtype);
    const bool mask_bytes = full && (access.native & kMaskBit) != 0;
    if (p.mask.data == nullptr) {
#pragma unroll
      for (int k = 0; k < K; ++k) valid[k] = full ? kAllValid : ones_mask<T>(live[k]).word[0];
    } else if (mask_bytes) {
      const uint8_t* data = static_cast<const uint8_t*>(p.mask.data) + at.vector_offset(p.mask);
#pragma unroll
      for (int k = 0; k < K; ++k) valid[k] = __ldg(reinterpret_cast<const uint32_t*>(data + k * at.vector_stride(p.mask)));
    }
    issue(values, p.values, at, live, full, access, kValuesBit);
    issue(returns, p.returns, at, live, full, access, kReturnsBit);
    if constexpr (kClip) issue(old_values, p.old_values, at, live, full, access, kOldValuesBit);
    if (mask_bytes) {
#pragma unroll
      for (int k = 0; k < K; ++k) {  // a carry out of the low seven bits, or the high bit itself
        valid[k] = (((valid[k] & 0x7f7f7f7fu) + 0x7f7f7f7fu) | valid[k]) >> 7 & kAllValid;
      }
    } else if (p.mask.data != nullptr) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const Pack<T> w = load_weights<T>(p, at, k, live[k], access);
        valid[k] = 0;
#pragma unroll
        for (int i = 0; i < kVec; ++i) valid[k] |= w.v[i] != T(0) ? 1u << (8 * i) : 0u;
      }
    }
    widen(values, p.values, full, access, kValuesBit);
    widen(returns, p.returns, full, access, kReturnsBit);
    if constexpr (kClip) widen(old_values, p.old_values, full, access, kOldValuesBit);
  }
};

struct Segment {
  int64_t start, length;
};

__device__ __forceinline__ int64_t segment_bound(const Layout& l, int64_t i) {
  const int64_t b = l.cu_seqlens_dtype == DType::kInt32 ? static_cast<int64_t>(__ldg(static_cast<const int32_t*>(l.cu_seqlens) + i))
                                                        : static_cast<int64_t>(__ldg(static_cast<const long long*>(l.cu_seqlens) + i));
  return b < 0 ? 0 : b > l.seq_len ? l.seq_len : b;
}

__device__ __forceinline__ Segment load_segment(const Layout& l, int64_t s) {
  const int64_t start = segment_bound(l, s), end = segment_bound(l, s + 1);
  return {start, end > start ? end - start : 0};
}

// --- forward -----------------------------------------------------------------------------------------------------------------

struct ForwardPlan {
  bool columns = false;   // threads across sequences
  bool neighbours = false;  // columns: a thread's columns are neighbours
  int threads = 0, blocks = 0;
  int lanes = 0;          // rows: lanes that share a row; columns: lanes side by side, each with kVec columns
  int splits = 1;         // parts that a row is cut into; with more than one, row partials go through the workspace
  int64_t items = 0;      // (row or tile of columns, part)
  int64_t rounds = 0;     // items that a group of lanes (rows) or a block (columns) works through
  Access access;
  PackPhase phase;
};

struct Scratch {
  unsigned* ticket;
  BlockPartial* blocks;
  void* rows;  // RowPartial<T>[row * splits + split], splits > 1 only
};
constexpr int64_t kScratchAlign = 256;

Scratch carve(void* workspace, const ForwardPlan& plan) {
  char* at = static_cast<char*>(workspace);
  return {reinterpret_cast<unsigned*>(at), reinterpret_cast<BlockPartial*>(at + kScratchAlign),
          at + kScratchAlign + plan.blocks * static_cast<int64_t>(sizeof(BlockPartial))};
}

template <typename T, bool kClip, int kRows>
struct Walker {
  static constexpr int K = kPacks<T, kRows>;
  const ValueLossParams& p;
  const ForwardPlan& plan;
  Sums<T, kRows> sums;
  double total = 0;  // lanes 2 k and 2 k + 1: sum k of the warp
  T low, high;
  bool weighted;
  int passes = 0;

  __device__ __forceinline__ Walker(const ValueLossParams& params, const ForwardPlan& plan_) : p(params), plan(plan_) {
    low = kClip ? static_cast<T>(load_number(p.clip_low)) : T(0);
    high = kClip ? static_cast<T>(load_number(p.clip_high)) : T(0);
    weighted = p.mask.data != nullptr && is_floating(p.mask.dtype);
  }

  // All lanes of the warp together.
  __device__ __forceinline__ void pass(const Place<(kRows > 1)>& at, const unsigned (&live)[K], bool full) {
    const Tokens<T, kClip, K> tokens(p, at, live, full, plan.access);
    if (passes == Geometry::kFlushPasses) {
      settle(sums, weighted);
      flush(sums, total, weighted);
      passes = 0;
    }
    ++passes;
    if (!sums.centred) {
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (!sums.centred) choose_centre(tokens.values[k], tokens.returns[k], tokens.valid[k]);
    }
    if (tokens.weighted) {
      accumulate_group<true>(tokens, at, live);
    } else {
      accumulate_group<false>(tokens, at, live);
    }
  }

  template <bool kWeighted>
  __device__ __forceinline__ void accumulate_group(const Tokens<T, kClip, K>& tokens, const Place<(kRows > 1)>& at,
                                                   const unsigned (&live)[K]) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      Pack<T> losses = {};
      const uint32_t valid = tokens.valid[k];
      Pack<T> w = {};
      if constexpr (kWeighted) w = load_weights<T>(p, at, k, live[k], plan.access);
      sums.tokens += valid;
      sums.seen |= valid;
      if (!kWeighted && __all_sync(kAllLanes, valid == kAllValid)) {
        losses = accumulate<kClip, kWeighted, true>(sums, tokens.values[k], tokens.old_values[k], tokens.returns[k], w, valid, low, high);
      } else if (__any_sync(kAllLanes, valid != 0)) {
        losses = accumulate<kClip, kWeighted, false>(sums, tokens.values[k], tokens.old_values[k], tokens.returns[k], w, valid, low, high);
      }
      if (p.reduction == Reduction::kNone) {
        Output x = p.tokens;
        x.dtype = accumulation_dtype<T>;
        const Place<(kRows > 1)> rare = at.rare();
        store4(x, rare.offset(x, k), rare.element_stride(x), losses, live[k], (plan.access.native & kOutputBit) != 0);
      }
    }
  }

  // The first valid token of the first lane that has one, if any has.
  __device__ __forceinline__ void choose_centre(const Pack<T>& v, const Pack<T>& ret, uint32_t valid) {
    const unsigned lanes = __ballot_sync(kAllLanes, valid != 0);
    if (lanes == 0) return;
    T cv = v.v[kVec - 1], cr = ret.v[kVec - 1];
#pragma unroll
    for (int i = kVec - 2; i >= 0; --i) {
      const bool on = (valid & 1u << (8 * i)) != 0;
      cv = on ? v.v[i] : cv;
      cr = on ? ret.v[i] : cr;
    }
    const int source = __ffs(lanes) - 1;
    sums.centre_value = __shfl_sync(kAllLanes, cv, source);
    sums.centre_return = __shfl_sync(kAllLanes, cr, source);
    sums.centred = true;
  }

  __device__ __forceinline__ void begin_rows() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums.row_loss[r] = sums.row_weight[r] = T(0);
    sums.seen = 0;
  }
};

template <typename T>
__device__ __forceinline__ void clear_tokens(const Output& x, int64_t first, int64_t end, int step) {
  for (int64_t t = first; t < end; t += step) static_cast<T*>(x.data)[t * x.time_stride] = T(0);
}

// Rows along time: `lanes` lanes of a warp share a row, or a part of one.
template <typename T, bool kClip>
__device__ __forceinline__ void walk_rows(Walker<T, kClip, 1>& walker, void* row_partials) {
  constexpr int K = kPacks<T>;
  const ValueLossParams& p = walker.p;
  const ForwardPlan& plan = walker.plan;
  const Layout& layout = p.layout;
  const int lane = lane_id() & (plan.lanes - 1);
  const int64_t group = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / static_cast<unsigned>(plan.lanes);
  const int64_t groups = static_cast<int64_t>(gridDim.x) * (blockDim.x / static_cast<unsigned>(plan.lanes));
  const unsigned group_lanes = (plan.lanes == kWarp ? kAllLanes : (1u << plan.lanes) - 1) << (lane_id() & ~(plan.lanes - 1));
  const int pass_tokens = kVec * K * plan.lanes;

  for (int64_t round = 0; round < plan.rounds; ++round) {
    const int64_t item = group + round * groups;
    int64_t row = item;
    int part = 0;
    if (plan.splits > 1) {  // few rows: the item fits 32 bits
      row = static_cast<unsigned>(item) / static_cast<unsigned>(plan.splits);
      part = static_cast<unsigned>(item) % static_cast<unsigned>(plan.splits);
    }
    const bool present = item < plan.items;
    Segment segment = {0, present ? layout.seq_len : 0};
    if (layout.cu_seqlens != nullptr && present) segment = load_segment(layout, row);
    const int lead = plan.phase.lead(layout.cu_seqlens != nullptr ? segment.start : row);
    // Token 0 of the part, on a pack boundary; the live tokens of the part are [first, last).
    int64_t origin = -lead, part_length = segment.length + lead;
    if (plan.splits > 1) {
      const int64_t share = round_up(ceil_div(segment.length, plan.splits), pass_tokens);
      origin += part * share;
      const int64_t rest = segment.length - origin;
      part_length = part == plan.splits - 1 || rest < share ? rest : share;
    }
    const int first = origin < 0 ? static_cast<int>(-origin) : 0, last = static_cast<int>(part_length > 0 ? part_length : 0);

    walker.begin_rows();
    for (int base = 0; __any_sync(kAllLanes, base < last); base += pass_tokens) {
      const int token = base + kVec * lane;
      const bool full = base >= first && base + pass_tokens <= last;
      unsigned live[K];
#pragma unroll
      for (int k = 0; k < K; ++k) live[k] = kAllLive;
      if (!full) {
#pragma unroll
        for (int k = 0; k < K; ++k) live[k] = live_elements(token + kVec * k * plan.lanes - first, last - first);
      }
      const Place<false> at = {layout.cu_seqlens != nullptr ? 0 : row, segment.start + origin + token, kVec * plan.lanes, 0};
      walker.pass(at, live, full);
    }
    settle(walker.sums, walker.weighted);
    if (layout.cu_seqlens != nullptr && p.reduction == Reduction::kNone) {
      // Tokens before the first segment and after the last belong to none, but are written all the same.
      if (item == 0) clear_tokens<T>(p.tokens, lane, segment.start, plan.lanes);
      if (item == plan.items - 1) clear_tokens<T>(p.tokens, segment.start + segment.length + lane, layout.seq_len, plan.lanes);
    }

    const bool seen = (__ballot_sync(kAllLanes, walker.sums.seen != 0) & group_lanes) != 0;
    T loss = 0, weight = 0;
    if (p.reduction == Reduction::kSeqMeanTokenMean) {
      loss = group_sum(walker.sums.row_loss[0], plan.lanes);
      weight = group_sum(walker.sums.row_weight[0], plan.lanes);
    }
    if (lane == 0 && present) {
      if (plan.splits > 1) {
        static_cast<RowPartial<T>*>(row_partials)[item] = {loss, weight, seen ? T(1) : T(0), T(0)};
      } else {
        end_row(p, row, loss, weight, seen, walker.sums.sum[kSequences], walker.sums.sum[kRowMeans]);
      }
    }
  }
}

// Time-major: a tile is kVec * lanes columns; the other threads of the block take every further time step.
template <typename T, bool kClip>
__device__ __forceinline__ void walk_columns(Walker<T, kClip, kVec>& walker, void* row_partials) {
  constexpr int K = kPacks<T, kVec>;
  constexpr int kTile = kVec * kWarp, kWarps = Geometry::kMaxThreads / kWarp;
  __shared__ T tile_loss[kWarps][kTile], tile_weight[kWarps][kTile];
  __shared__ uint8_t tile_seen[kWarps][kTile];
  const ValueLossParams& p = walker.p;
  const ForwardPlan& plan = walker.plan;
  const int64_t columns = p.layout.num_seqs, steps = p.layout.seq_len;
  const int tile = kVec * plan.lanes;
  const int lane = static_cast<int>(threadIdx.x) & (plan.lanes - 1), time_lane = static_cast<int>(threadIdx.x) / plan.lanes;
  const int time_lanes = static_cast<int>(blockDim.x) / plan.lanes;
  // Aligned: a thread's columns are neighbours. Otherwise they are `lanes` apart, which keeps scalar accesses coalesced.
  const bool vec = plan.neighbours;
  const int my_column = vec ? kVec * lane : lane, column_step = vec ? 1 : plan.lanes;

  for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
    const int64_t column = item / plan.splits * tile;
    const int part = static_cast<int>(item % plan.splits);
    const int64_t share = ceil_div(steps, plan.splits), start = part * share;
    const int64_t stop = start + share < steps ? start + share : steps;
    unsigned live_columns = 0;
#pragma unroll
    for (int i = 0; i < kVec; ++i) live_columns |= column + my_column + i * column_step < columns ? 1u << i : 0u;

    walker.begin_rows();
    for (int64_t base = start; base < stop; base += K * time_lanes) {
      unsigned live[K];
      bool full = true;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        live[k] = base + time_lane + k * time_lanes < stop ? live_columns : 0u;
        full = full && live[k] == kAllLive;
      }
      walker.pass({column + my_column, base + time_lane, time_lanes, column_step}, live, full);
    }
    settle(walker.sums, walker.weighted);

    // Over the time lanes of the warp by shuffles, then over the warps in order.
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      T loss = walker.sums.row_loss[i], weight = walker.sums.row_weight[i];
      uint32_t seen = walker.sums.seen >> (8 * i) & 1u;
      for (int o = plan.lanes; o < kWarp; o *= 2) {
        loss += __shfl_xor_sync(kAllLanes, loss, o);
        weight += __shfl_xor_sync(kAllLanes, weight, o);
        seen |= __shfl_xor_sync(kAllLanes, seen, o);
      }
      if (lane_id() < plan.lanes) {
        const int warp = static_cast<int>(threadIdx.x) / kWarp, c = my_column + i * column_step;
        tile_loss[warp][c] = loss, tile_weight[warp][c] = weight, tile_seen[warp][c] = static_cast<uint8_t>(seen);
      }
    }
    __syncthreads();
    for (int c = static_cast<int>(threadIdx.x); c < tile && column + c < columns; c += static_cast<int>(blockDim.x)) {
      T loss = 0, weight = 0;
      bool seen = false;
      for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) {
        loss += tile_loss[warp][c];
        weight += tile_weight[warp][c];
        seen = seen || tile_seen[warp][c] != 0;
      }
      if (plan.splits > 1) {
        static_cast<RowPartial<T>*>(row_partials)[(column + c) * plan.splits + part] = {loss, weight, seen ? T(1) : T(0), T(0)};
      } else {
        end_row(p, column + c, loss, weight, seen, walker.sums.sum[kSequences], walker.sums.sum[kRowMeans]);
      }
    }
    __syncthreads();
  }
}

struct FinishStorage {
  double warp[Geometry::kMaxThreads / kWarp][kMaxSlots];
  double stripe[Geometry::kMaxThreads / kMaxSlots][kMaxSlots];
  double rows[Geometry::kMaxThreads / kWarp][2];
};

__device__ __forceinline__ double combine(int slot, double a, double b) {
  return slot >= kNumSums ? (b > a ? b : a) : a + b;  // -min and max, or sums
}
__device__ __forceinline__ double neutral(int slot) { return slot >= kNumSums ? -INFINITY : 0.0; }

// Rows that were split: a group of lanes merges the parts of one row, lane by lane, then across the group.
template <typename T>
__device__ __forceinline__ void finish_rows(const ValueLossParams& p, const ForwardPlan& plan, const void* row_partials,
                                            FinishStorage& storage) {
  const RowPartial<T>* partials = static_cast<const RowPartial<T>*>(row_partials);
  int lanes = 1;
  while (lanes < plan.splits && lanes < kWarp) lanes *= 2;
  const int lane = lane_id() & (lanes - 1);
  const int64_t rows = p.layout.num_seqs, groups = static_cast<int>(blockDim.x) / lanes;
  const bool sums_needed = p.reduction == Reduction::kSeqMeanTokenMean;
  double sequences = 0, row_means = 0;
  for (int64_t base = 0; base < rows; base += groups) {
    const int64_t row = base + static_cast<int>(threadIdx.x) / lanes;
    double loss = 0, weight = 0, seen = 0;
    if (row < rows) {
#pragma unroll 4
      for (int part = lane; part < plan.splits; part += lanes) {
        const RowPartial<T>& x = partials[row * plan.splits + part];
        seen += __ldcg(&x.seen);
        if (sums_needed) loss += __ldcg(&x.loss), weight += __ldcg(&x.weight);
      }
    }
    seen = group_sum(seen, lanes);
    if (sums_needed) loss = group_sum(loss, lanes), weight = group_sum(weight, lanes);
    if (lane == 0 && row < rows) end_row(p, row, loss, weight, seen > 0, sequences, row_means);
  }
  sequences = group_sum(sequences, kWarp);
  row_means = group_sum(row_means, kWarp);
  if (lane_id() == 0) {
    storage.rows[threadIdx.x / kWarp][0] = sequences;
    storage.rows[threadIdx.x / kWarp][1] = row_means;
  }
}

// Every block leaves its partial; the last one combines them in index order and writes moments, loss and residuals.
template <typename T, bool kClip, int kRows>
__device__ __forceinline__ void finish(Walker<T, kClip, kRows>& walker, const Scratch& scratch) {
  __shared__ FinishStorage storage;
  const ValueLossParams& p = walker.p;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
  flush(walker.sums, walker.total, walker.weighted);
  const double negated_min = warp_max(-walker.sums.value_min), max = warp_max(walker.sums.value_max);
  if (lane_id() % 2 == 0) {
    const int slot = lane_slot();
    storage.warp[warp][slot] = slot == kPartialMin ? negated_min : slot == kPartialMax ? max : slot < kNumSums ? walker.total : 0.0;
  }
  __syncthreads();
  if (threadIdx.x < kMaxSlots) {
    const int slot = static_cast<int>(threadIdx.x);
    double x = storage.warp[0][slot];
    for (int w = 1; w < warps; ++w) x = combine(slot, x, storage.warp[w][slot]);
    scratch.blocks[blockIdx.x].sum[slot] = x;
  }
  if (!is_last_block(scratch.ticket)) return;

  const int slot = static_cast<int>(threadIdx.x) % kMaxSlots, stripe = static_cast<int>(threadIdx.x) / kMaxSlots;
  const int stripes = static_cast<int>(blockDim.x) / kMaxSlots;
  double x = neutral(slot);
#pragma unroll 8
  for (int b = stripe; b < static_cast<int>(gridDim.x); b += stripes) x = combine(slot, x, __ldcg(&scratch.blocks[b].sum[slot]));
  storage.stripe[stripe][slot] = x;
  if (walker.plan.splits > 1) finish_rows<T>(p, walker.plan, scratch.rows, storage);
  __syncthreads();
  if (threadIdx.x < kMaxSlots) {
    for (int i = 1; i < stripes; ++i) x = combine(slot, x, storage.stripe[i][slot]);
    if (walker.plan.splits > 1 && (slot == kSequences || slot == kRowMeans)) {
      for (int w = 0; w < warps; ++w) x += storage.rows[w][slot == kRowMeans];
    }
    storage.warp[0][slot] = x;
    if (slot <= kSequences) p.stats[slot] = x;
    if (slot == kPartialMin) p.stats[kValueMin] = -x;
    if (slot == kPartialMax) p.stats[kValueMax] = x;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;

  const double* sum = storage.warp[0];
  double numerator = sum[kLoss], denominator = 1, factor = p.factor;
  switch (p.reduction) {
    case Reduction::kTokenMean: denominator = p.has_count ? load_number(p.count) : sum[kWeight]; break;
    case Reduction::kSeqMeanTokenMean: numerator = sum[kRowMeans]; [[fallthrough]];
    case Reduction::kSeqMeanTokenSum:
    case Reduction::kSeqMeanTokenSumNorm: denominator = p.has_count ? load_number(p.count) : sum[kSequences]; break;
    case Reduction::kTokenSum: break;
    case Reduction::kNone: factor = 1; break;
  }
  const double scale = denominator != 0 ? factor / denominator : 0.0;
  if (p.reduction != Reduction::kNone) *static_cast<T*>(p.loss) = denominator != 0 ? static_cast<T>(numerator * scale) : T(0);
  p.residuals[kScale] = scale;
  p.residuals[kClipLow] = walker.low;
  p.residuals[kClipHigh] = walker.high;
}

// Without clipping old_values are not read: less traffic and fewer registers, hence a template argument.
// The bounds: see Geometry::kMaxThreads; in double the sums alone take half of the registers that three blocks would leave.
template <typename T, bool kClip, bool kColumns>
__global__ void __launch_bounds__(Geometry::kMaxThreads, sizeof(T) == sizeof(float) ? 3 : 2)
value_loss_kernel(const ValueLossParams p, const ForwardPlan plan, const Scratch scratch) {
  Walker<T, kClip, kColumns ? kVec : 1> walker(p, plan);
  if constexpr (kColumns) {
    walk_columns(walker, scratch.rows);
  } else {
    walk_rows(walker, scratch.rows);
  }
  finish(walker, scratch);
}

// --- host: plans -------------------------------------------------------------------------------------------------------------

// An operand or output as the pack planner sees it: packs along `pack_stride`, rows `row_stride` apart.
struct Lines {
  const void* data;
  DType dtype;
  int64_t pack_stride, row_stride;
  unsigned bit;
};

template <typename X>
Lines lines_of(const X& x, unsigned bit, bool packed, bool across_seqs = false) {
  // Packed rows start at their first token, one element apart per token.
  if (across_seqs) return {x.data, x.dtype, x.seq_stride, x.time_stride, bit};
  return {x.data, x.dtype, x.time_stride, packed ? x.time_stride : x.seq_stride, bit};
}

// The phase under which the most bytes are aligned, and the bits of the tensors that are.
template <int N>
unsigned align(const Lines (&all)[N], PackPhase& best) {
  unsigned best_bits = 0;
  int best_bytes = -1;
  for (const Lines& candidate : all) {
    if (candidate.data == nullptr) continue;
    const PackPhase phase = pack_phase(candidate.data, candidate.dtype, candidate.row_stride);
    unsigned bits = 0;
    int bytes = 0;
    for (const Lines& x : all) {
      if (x.data == nullptr || !pack_aligned(x.data, x.dtype, x.pack_stride, x.row_stride, phase)) continue;
      bits |= x.bit;
      bytes += dtype_size(x.dtype);
    }
    if (bytes > best_bytes) best = phase, best_bits = bits, best_bytes = bytes;
  }
  return best_bits;
}

template <typename T, int N>
Access access_to(const Lines (&all)[N], unsigned aligned) {
  Access access;
  access.aligned = aligned;
  for (const Lines& x : all) {
    if (x.data == nullptr || (aligned & x.bit) == 0) continue;
    const DType native = x.bit == kMaskBit ? DType::kInt8 : accumulation_dtype<T>;
    if (x.dtype == native) access.native |= x.bit;
    const bool half = x.dtype == DType::kBFloat16 || x.dtype == DType::kFloat16;
    if (half && x.bit != kMaskBit && sizeof(T) == sizeof(float)) access.half |= x.bit;
  }
  return access;
}

bool time_major(const Layout& l, const Operand& values) {
  return l.cu_seqlens == nullptr && l.num_seqs > 1 && l.seq_len > 1 && std::abs(values.seq_stride) < std::abs(values.time_stride);
}

template <typename T>
ForwardPlan plan_forward(const ValueLossParams& p) {
  ForwardPlan plan;
  const Layout& l = p.layout;
  const bool packed = l.cu_seqlens != nullptr;
  plan.columns = time_major(l, p.values);
  const Output none;
  const Output& tokens = p.reduction == Reduction::kNone ? p.tokens : none;
  const Lines all[] = {lines_of(p.values, kValuesBit, packed, plan.columns), lines_of(p.old_values, kOldValuesBit, packed, plan.columns),
                       lines_of(p.returns, kReturnsBit, packed, plan.columns), lines_of(p.mask, kMaskBit, packed, plan.columns),
                       lines_of(tokens, kOutputBit, packed, plan.columns)};
  const int64_t tokens_in_all = packed ? l.seq_len : l.num_seqs * l.seq_len;
  const int64_t warps_wanted = std::min(ceil_div(tokens_in_all, Geometry::kWarpTokens), Geometry::kMaxWarps);
  if (plan.columns) {
    // Columns keep their thread over all time steps, so all tensors have to be aligned at once, at every step.
    plan.neighbours = true;
    for (const Lines& x : all) plan.neighbours = plan.neighbours && pack_aligned(x.data, x.dtype, x.pack_stride, x.row_stride, PackPhase{});
    plan.access = access_to<T>(all, plan.neighbours ? ~0u : 0u);
    plan.threads = Geometry::kMaxThreads;
    plan.lanes = pow2_ceil(ceil_div(l.num_seqs, kVec), kWarp);
    const int64_t tiles = ceil_div(l.num_seqs, kVec * plan.lanes);
    const int64_t pass_steps = static_cast<int64_t>(kPacks<T, kVec>) * (plan.threads / plan.lanes);
    const int64_t blocks_wanted = ceil_div(warps_wanted, plan.threads / kWarp);
    plan.splits = static_cast<int>(std::max<int64_t>(1, std::min(ceil_div(blocks_wanted, tiles), ceil_div(l.seq_len, pass_steps))));
    plan.items = tiles * plan.splits;
    plan.blocks = static_cast<int>(std::min(plan.items, Geometry::kMaxWarps * kWarp / plan.threads));
    return plan;
  }
  plan.access = access_to<T>(all, align(all, plan.phase));
  const int64_t row_packs = ceil_div(packed ? ceil_div(l.seq_len, l.num_seqs) : l.seq_len, kVec);
  plan.lanes = pow2_ceil(std::max(ceil_div(row_packs, kPacks<T>), std::min<int64_t>(row_packs, Geometry::kMinLanes)), kWarp);
  const int64_t rows_per_warp = kWarp / plan.lanes;
  if (l.num_seqs < Geometry::kSplitWarps / 2) {
    const int64_t share = std::max(ceil_div(row_packs * kVec * l.num_seqs, Geometry::kSplitWarps), Geometry::kWarpTokens);
    const int64_t pass_tokens = static_cast<int64_t>(kVec) * kPacks<T> * plan.lanes;
    plan.splits = static_cast<int>(ceil_div(row_packs * kVec, round_up(share, pass_tokens)));
  }
  plan.splits = static_cast<int>(std::max<int64_t>(plan.splits, ceil_div(l.seq_len, Geometry::kMaxPart)));
  plan.items = l.num_seqs * plan.splits;
  const int64_t warps = std::min(std::max<int64_t>(warps_wanted, plan.splits > 1 ? plan.items : 1), ceil_div(plan.items, rows_per_warp));
  plan.threads = std::max(Geometry::kMinThreads, pow2_ceil(warps * kWarp / Geometry::kManyBlocks, Geometry::kMaxThreads));
  const int64_t block_groups = plan.threads / plan.lanes;
  plan.blocks = static_cast<int>(ceil_div(warps * kWarp, plan.threads));
  plan.rounds = ceil_div(plan.items, plan.blocks * block_groups);
  return plan;
}

template <typename T, bool kClip>
void launch_forward(const ValueLossParams& p, const ForwardPlan& plan, const Scratch& scratch, cudaStream_t stream) {
  if (plan.columns) {
    value_loss_kernel<T, kClip, true><<<plan.blocks, plan.threads, 0, stream>>>(p, plan, scratch);
  } else {
    value_loss_kernel<T, kClip, false><<<plan.blocks, plan.threads, 0, stream>>>(p, plan, scratch);
  }
}

}  // namespace

template <typename T>
int64_t value_loss_workspace(const ValueLossParams& p) {
  const ForwardPlan plan = plan_forward<T>(p);
  const int64_t rows = plan.splits > 1 ? p.layout.num_seqs * plan.splits : 0;
  return kScratchAlign + plan.blocks * static_cast<int64_t>(sizeof(BlockPartial)) + rows * static_cast<int64_t>(sizeof(RowPartial<T>));
}

template <typename T>
void launch_value_loss(const ValueLossParams& p, void* workspace, cudaStream_t stream) {
  const ForwardPlan plan = plan_forward<T>(p);
  const Scratch scratch = carve(workspace, plan);
  cudaMemsetAsync(scratch.ticket, 0, sizeof(*scratch.ticket), stream);
  if (p.clip) {
    launch_forward<T, true>(p, plan, scratch, stream);
  } else {
    launch_forward<T, false>(p, plan, scratch, stream);
  }
}

template int64_t value_loss_workspace<float>(const ValueLossParams&);
template int64_t value_loss_workspace<double>(const ValueLossParams&);
template void launch_value_loss<float>(const ValueLossParams&, void*, cudaStream_t);
template void launch_value_loss<double>(const ValueLossParams&, void*, cudaStream_t);

// --- backward ----------------------------------------------------------------------------------------------------------------

namespace {

struct BackwardPlan {
  int lanes = 0;
  int64_t rows = 0, length = 0;  // after flattening and exchange of the axes
  int64_t parts = 0;             // passes that a row takes
  bool across_seqs = false;      // packs lie across sequences, rows are time steps
  bool flat = false;             // all tensors are dense in one order: one row
  Access access;
  PackPhase phase;
};

// The segment of a token: the last one that starts at or before it, if it ends behind it, else -1. In bounds for any content.
__device__ __forceinline__ int64_t find_segment(const Layout& l, int64_t token) {
  int64_t low = 0, high = l.num_seqs;  // segment_bound(low) <= token or low == 0; segment_bound(high) > token or high == num_seqs
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (segment_bound(l, middle) <= token) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return segment_bound(l, low) <= token && token < segment_bound(l, low + 1) ? low : -1;
}

// Elementwise: grad = grad_loss * scale * w * dl/dv, one pass of packs per group of lanes.
template <typename T, bool kClip>
__global__ void __launch_bounds__(Geometry::kBackwardThreads)
value_loss_backward_kernel(const ValueLossBackwardParams p, const BackwardPlan plan) {
  constexpr int K = kPacks<T>;
  const Layout& layout = p.layout;
  const bool packed = layout.cu_seqlens != nullptr;
  const int64_t item = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / static_cast<unsigned>(plan.lanes);
  if (item >= plan.rows * plan.parts) return;
  const int64_t row = plan.parts == 1 ? item : plan.rows == 1 ? 0 : item / plan.parts, part = item - row * plan.parts;
  const int lane = lane_id() & (plan.lanes - 1);
  const int pack_step = kVec * plan.lanes;
  const int64_t base = part * K * pack_step - plan.phase.lead(row);
  const int64_t first = base + kVec * lane;
  const bool full = base >= 0 && base + K * pack_step <= plan.length;
  unsigned live[K];
#pragma unroll
  for (int k = 0; k < K; ++k) live[k] = full ? kAllLive : live_elements<int64_t>(first + k * pack_step, plan.length);

  const Place<false> at = {row, first, pack_step, 0};
  const bool one_grad = p.grad_loss.seq_stride == 0 && p.grad_loss.time_stride == 0;
  Pack<T> grad[K] = {};
  if (!one_grad) issue(grad, p.grad_loss, at, live, full, plan.access, kGradBit);
  const Tokens<T, kClip, K> tokens(p, at, live, full, plan.access);

  double scale = p.residuals[kScale];
  if (one_grad) scale *= load<double>(p.grad_loss.data, p.grad_loss.dtype, 0);
  if (p.seq_scale && !packed && !plan.across_seqs) scale *= p.residuals[kSeqScale + row];
  const T low = kClip ? static_cast<T>(p.residuals[kClipLow]) : T(0), high = kClip ? static_cast<T>(p.residuals[kClipHigh]) : T(0);
  const T row_scale = static_cast<T>(scale);
  const int64_t segments_begin = packed ? segment_bound(layout, 0) : 0, segments_end = packed ? segment_bound(layout, layout.num_seqs) : 0;

#pragma unroll
  for (int k = 0; k < K; ++k) {
    uint32_t valid = tokens.valid[k];
    Pack<T> factor, out;  // d(sum of grad_loss * loss) / d(l)
#pragma unroll
    for (int i = 0; i < kVec; ++i) factor.v[i] = one_grad ? row_scale : row_scale * grad[k].v[i];
    if (tokens.weighted) {
      const Pack<T> weights = load_weights<T>(p, at, k, live[k], plan.access);
#pragma unroll
      for (int i = 0; i < kVec; ++i) factor.v[i] *= weights.v[i];
    }
    if (packed || (p.seq_scale && plan.across_seqs)) {  // the sequence changes from token to token
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        if ((valid & 1u << (8 * i)) == 0) continue;
        const int64_t token = first + k * pack_step + i;
        int64_t seq = token;
        if (packed) seq = p.seq_scale ? find_segment(layout, token) : token >= segments_begin && token < segments_end ? 0 : -1;
        if (seq < 0) valid &= ~(1u << (8 * i));
        if (seq >= 0 && p.seq_scale) factor.v[i] *= static_cast<T>(p.residuals[kSeqScale + seq]);
      }
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const T v = tokens.values[k].v[i], ret = tokens.returns[k].v[i];
      const TokenLoss<T> loss = kClip ? clipped_value_loss(v, tokens.old_values[k].v[i], ret, low, high) : plain_value_loss(v, ret);
      out.v[i] = (valid & 1u << (8 * i)) != 0 ? factor.v[i] * loss.grad : T(0);
    }
    const Output& x = p.grad_values;
    store4(x, at.offset(x, k), out, live[k], (plan.access.aligned & kOutputBit) != 0);
  }
}

// One order in which all tensors are dense, so that they can be walked as one row.
bool flattens(const Lines& x, int64_t length) {
  return x.data == nullptr || (x.pack_stride == 0 && x.row_stride == 0) || (x.pack_stride == 1 && x.row_stride == length);
}

template <typename X>
X exchanged(X x) {
  std::swap(x.seq_stride, x.time_stride);
  return x;
}

template <typename T>
BackwardPlan plan_backward(ValueLossBackwardParams& p) {
  BackwardPlan plan;
  const bool packed = p.layout.cu_seqlens != nullptr;
  plan.rows = packed ? 1 : p.layout.num_seqs;
  plan.length = p.layout.seq_len;
  plan.across_seqs = time_major(p.layout, p.values);
  if (plan.across_seqs) {
    std::swap(plan.rows, plan.length);
    p.values = exchanged(p.values), p.old_values = exchanged(p.old_values), p.returns = exchanged(p.returns), p.mask = exchanged(p.mask);
    p.grad_loss = exchanged(p.grad_loss), p.grad_values = exchanged(p.grad_values);
  }
  const Lines all[] = {lines_of(p.values, kValuesBit, false), lines_of(p.old_values, kOldValuesBit, false),
                       lines_of(p.returns, kReturnsBit, false), lines_of(p.mask, kMaskBit, false), lines_of(p.grad_loss, kGradBit, false),
                       lines_of(p.grad_values, kOutputBit, false)};
  bool flat = !p.seq_scale;
  for (const Lines& x : all) flat = flat && flattens(x, plan.length);
  if (flat) plan.length *= plan.rows, plan.rows = 1;
  plan.access = access_to<T>(all, align(all, plan.phase));
  const int64_t row_packs = ceil_div(plan.length, kVec);
  plan.lanes = pow2_ceil(std::max(ceil_div(row_packs, kPacks<T>), std::min<int64_t>(row_packs, Geometry::kMinLanes)), kWarp);
  const int64_t max_lead = (plan.rows == 1 || plan.phase.row_stride == 0) ? plan.phase.lead(0) : kVec - 1;
  plan.parts = ceil_div(plan.length + max_lead, static_cast<int64_t>(kVec) * kPacks<T> * plan.lanes);
  return plan;
}

}  // namespace

template <typename T>
void launch_value_loss_backward(const ValueLossBackwardParams& params, cudaStream_t stream) {
  ValueLossBackwardParams p = params;
  const BackwardPlan plan = plan_backward<T>(p);
  const int64_t blocks = ceil_div(plan.rows * plan.parts, Geometry::kBackwardThreads / plan.lanes);
  if (p.clip) {
    value_loss_backward_kernel<T, true><<<static_cast<unsigned>(blocks), Geometry::kBackwardThreads, 0, stream>>>(p, plan);
  } else {
    value_loss_backward_kernel<T, false><<<static_cast<unsigned>(blocks), Geometry::kBackwardThreads, 0, stream>>>(p, plan);
  }
}

template void launch_value_loss_backward<float>(const ValueLossBackwardParams&, cudaStream_t);
template void launch_value_loss_backward<double>(const ValueLossBackwardParams&, cudaStream_t);

}  // namespace fused_critic::cuda
