// Masked clipped value loss on CUDA: one launch forward, one backward.
//
// Forward reads every operand once and writes nothing per token (13 bytes per token for float and a one-byte mask; kNone adds one
// store); backward reads the same and writes the gradient. Results are deterministic: the warps' partial results are combined in a fixed
// order by the block that finishes last, there is no floating-point atomic, and the split of the work depends on the shape alone.
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
  static constexpr int kMaxThreads = 128;        // two such blocks per multiprocessor: no spills, 53 KB in flight
  static constexpr int kMinThreads = 32;         // small problems: smaller blocks reach more multiprocessors
  static constexpr int64_t kWarpTokens = 1024;   // below this a warp's reduction costs more than its tokens
  static constexpr int64_t kMaxWarps = 2048;     // fills the largest GPUs; more would only lengthen the finish
  static constexpr int64_t kSplitWarps = 2048;   // with fewer rows than half of this, rows are split until this many warps have work
  static constexpr int64_t kManyBlocks = 256;    // blocks grow from the least to the greatest size beyond this many
  static constexpr int kMinLanes = 8;            // a group's mask bytes fill a 32-byte sector
  static constexpr int kFlushPasses = 8;         // sums stay in T for this many passes (128 tokens per lane of float), then go to double
  static constexpr int64_t kMaxPart = 1 << 30;   // positions inside a part are int
  static constexpr int kBackwardThreads = 128;   // one pass per warp; small blocks balance best, four per multiprocessor: 128 registers
};
static_assert(Geometry::kMaxThreads % kWarp == 0 && Geometry::kMinThreads % kWarp == 0, "whole warps");

// Packs that one thread has in flight: as many as leave the sums in registers. Columns keep sums for kVec rows, double needs twice the
// registers, and options need some.
template <typename T, int kRows = 1, Form kForm = Form::kClipped>
constexpr int kPacks = (sizeof(T) == sizeof(float) ? 4 : 2) / (kRows == 1 && kForm != Form::kOptions ? 1 : 2);
static_assert(Geometry::kFlushPasses * kPacks<float> < 256, "tokens per column are counted in bytes between two flushes");

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline int pow2_ceil(int64_t x, int limit) {
  int p = 1;
  while (p < x && p < limit) p *= 2;
  return p;
}

// --- sums --------------------------------------------------------------------------------------------------------------------

// What a lane adds up token by token, in T. Value, return and error (R - v) are taken about the warp's centre, one of its valid tokens, so
// that squares in T keep their digits; the error's own sum follows from the other two.
enum Slot { kLossSlot, kClippedSlot, kOutsideSlot, kValueSlot, kValueSqSlot, kReturnSlot, kReturnSqSlot, kErrorSqSlot };

// A count as the bits of a T, so that a partial consists of T alone.
__device__ __forceinline__ void put_count(float& x, uint32_t n) { x = __uint_as_float(n); }
__device__ __forceinline__ void put_count(double& x, uint32_t n) { x = __hiloint2double(0, static_cast<int>(n)); }
__device__ __forceinline__ uint32_t get_count(float x) { return __float_as_uint(x); }
__device__ __forceinline__ uint32_t get_count(double x) { return static_cast<uint32_t>(__double2loint(x)); }

// What a warp leaves for the finish; the loss without its factor 0.5.
template <typename T>
struct alignas(4 * sizeof(T)) WarpPartial {
  T slot[kSumSlots];
  T value_min, value_max, centre_value, centre_return;
  T weight, row_means, tokens, sequences;  // row_means: sum over rows of row loss / row weight; the last two by put_count
};

// What one part of a row that is split over warps or blocks leaves for the finish: one 16-byte access for float.
template <typename T>
struct alignas(4 * sizeof(T)) RowPartial {
  T loss, weight, seen, unused;
};

// Instead, where only the number of rows with a valid token is wanted, a part of a tile of columns leaves a bit per column.
constexpr int kSeenWords = kVec;  // of 32 columns each

// Sums of one thread. kRows: rows that a thread works on at a time (1 along time, kVec across sequences).
template <typename T, int kRows>
struct Sums {
  T slot[kSumSlots] = {};                             // since the last flush; the loss up to the last settle
  T loss[kRows] = {}, weight[kRows] = {};          // of the current row, since the last settle; weight only where a mask has weights
  T row_loss[kRows] = {}, row_weight[kRows] = {};  // of the current row, settled
  uint32_t valid_bytes = 0;                        // tokens with w != 0 since the last settle, one byte per element of the pack
  uint32_t seen = 0;                               // those bytes, or-ed over the row
  uint32_t tokens = 0, sequences = 0;              // settled
  T settled_weight = 0, row_means = 0;
  T value_min = T(INFINITY), value_max = T(-INFINITY);
  T centre_value = 0, centre_return = 0;
  bool centred = false;
};

constexpr uint32_t kAllValid = 0x01010101u;

// 1 where a > b and where a != b, else 0; a NaN is neither.
template <typename T>
__device__ __forceinline__ T is_greater(T a, T b) { return a > b ? T(1) : T(0); }
template <typename T>
__device__ __forceinline__ T is_different(T a, T b) { return a < b || a > b ? T(1) : T(0); }
template <>
__device__ __forceinline__ float is_greater(float a, float b) {
  float x;
  asm("set.gt.f32.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
  return x;
}
template <>
__device__ __forceinline__ float is_different(float a, float b) {
  float x;
  asm("set.ne.f32.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
  return x;
}

// What the loss of the tokens of one pack depends on, apart from themselves.
template <typename T, Form kForm>
struct Rule {
  T low, high;

  __device__ __forceinline__ TokenLoss<T> loss(int, T v, T old, T ret) const {
    return kForm == Form::kClipped ? clipped_value_loss(v, old, ret, low, high) : plain_value_loss(v, ret);
  }
};
template <typename T>
struct Rule<T, Form::kOptions> {
  Pack<T> low, high;
  TokenOptions<T> options;

  __device__ __forceinline__ TokenLossWithOptions<T> loss(int i, T v, T old, T ret) const {
    return value_loss_with_options(v, old, ret, low.v[i], high.v[i], options);
  }
};

// One pack into the sums. valid: a byte of 0 or 1 per token; kAll: all are 1 in the whole warp.
template <bool kWeighted, bool kAll, typename T, int kRows, Form kForm>
__device__ __forceinline__ void accumulate(Sums<T, kRows>& a, const Pack<T>& values, const Pack<T>& old_values, const Pack<T>& returns,
                                           const Pack<T>& weights, uint32_t valid, const Rule<T, kForm>& rule) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const T v = values.v[i], ret = returns.v[i], w = weights.v[i];
    const auto token = rule.loss(i, v, old_values.v[i], ret);
    const T twice = token.twice(), dv = v - a.centre_value, dr = ret - a.centre_return, de = dr - dv;
    if (!kAll && (valid & 1u << (8 * i)) == 0) continue;
    const T wdv = kWeighted ? w * dv : dv, wdr = kWeighted ? w * dr : dr, wde = kWeighted ? w * de : de;
    a.loss[i % kRows] += kWeighted ? w * twice : twice;
    if constexpr (kWeighted) a.weight[i % kRows] += w;
    if constexpr (kForm != Form::kPlain) {
      const T clipped = is_greater(token.clipped, token.unclipped), outside = is_different(token.vc, v);
      a.slot[kClippedSlot] += kWeighted ? w * clipped : clipped;
      a.slot[kOutsideSlot] += kWeighted ? w * outside : outside;
    }
    a.slot[kValueSlot] += wdv;
    a.slot[kValueSqSlot] += wdv * dv;
    a.slot[kReturnSlot] += wdr;
    a.slot[kReturnSqSlot] += wdr * dr;
    a.slot[kErrorSqSlot] += wde * de;
    a.value_min = fmin(v, a.value_min);
    a.value_max = fmax(v, a.value_max);
  }
}

// Moves what the current rows gathered since the last settle into the sums.
template <typename T, int kRows>
__device__ __forceinline__ void settle(Sums<T, kRows>& a, bool weighted) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const uint32_t n = kRows == 1 ? __dp4a(a.valid_bytes, kAllValid, 0u) : a.valid_bytes >> (8 * r) & 0xffu;
    a.tokens += n;
    const T w = weighted ? a.weight[r] : static_cast<T>(n);
    a.settled_weight += w;
    a.slot[kLossSlot] += a.loss[r];
    a.row_weight[r] += w, a.row_loss[r] += a.loss[r];
    a.weight[r] = a.loss[r] = T(0);
  }
  a.valid_bytes = 0;
}

// Ends a row, of which `loss` lacks the factor 0.5. An empty row counts for nothing.
template <typename T>
__device__ __forceinline__ void end_row(const ValueLossParams& p, int64_t row, T loss, T weight, bool seen, uint32_t& sequences,
                                        T& row_means) {
  sequences += seen ? 1 : 0;
  if (p.reduction != Reduction::kSeqMeanTokenMean) return;
  row_means += weight != T(0) ? T(0.5) * loss / weight : T(0);
  p.residuals[kSeqScale + row] = weight != T(0) ? 1.0 / static_cast<double>(weight) : 0.0;
}

// --- loading a group of packs ------------------------------------------------------------------------------------------------

enum TensorBit : unsigned {
  kValuesBit = 1, kOldValuesBit = 2, kReturnsBit = 4, kMaskBit = 8, kOutputBit = 16, kGradBit = 32, kLowBit = 64, kHighBit = 128
};

// How the tensors of a launch may be accessed, by TensorBit. Anything else goes element by element.
struct Access {
  unsigned aligned = 0;  // as vectors of their own type
  unsigned native = 0;   // of these: the accumulation type (the mask: bytes)
  unsigned half = 0;     // of these: a 2-byte floating type
  bool direct = false;   // all inputs are native, or the mask is absent
};

__host__ __device__ constexpr bool is_floating(DType t) {
  return t == DType::kFloat64 || t == DType::kFloat32 || t == DType::kBFloat16 || t == DType::kFloat16;
}

template <typename T>
constexpr DType accumulation_dtype = sizeof(T) == sizeof(float) ? DType::kFloat32 : DType::kFloat64;

// Where a thread's packs lie: pack k starts at token `time` + k * step() of sequence `seq`. Its elements follow each other along
// time, or, in columns, across sequences, seq_step apart. kStep: step() if it is known, which makes it part of the load instructions; or 0.
template <bool kColumns, int kStep = 0>
struct Place {
  int64_t seq, time;
  int time_step, seq_step;

  __device__ __forceinline__ int step() const { return kStep != 0 ? kStep : time_step; }
  template <typename X>
  __device__ __forceinline__ int64_t offset(const X& x, int k) const {
    return seq * x.seq_stride + (time + k * step()) * x.time_stride;
  }
  template <typename X>
  __device__ __forceinline__ int64_t element_stride(const X& x) const { return kColumns ? seq_step * x.seq_stride : x.time_stride; }
  // The same two for a tensor whose packs are vectors: one of its strides is 1.
  template <typename X>
  __device__ __forceinline__ int64_t vector_offset(const X& x) const {
    return kColumns ? seq + time * x.time_stride : seq * x.seq_stride + time;
  }
  template <typename X>
  __device__ __forceinline__ int64_t vector_stride(const X& x) const { return kColumns ? step() * x.time_stride : step(); }

  // The same place, of which the compiler knows nothing: keeps the addresses of rare paths from being computed ahead of the loop, where
  // they would take some thirty registers from the common path.
  __device__ __forceinline__ Place rare() const {
    Place at = *this;
    asm volatile("" : "+l"(at.seq), "+l"(at.time), "+r"(at.time_step), "+r"(at.seq_step));
    return at;
  }
};

// Which tokens of a pack exist, as a byte of 0 or 1 each: those of [first, last), of which the pack holds [token, token + kVec).
template <typename I>
__device__ __forceinline__ uint32_t live_bytes(I token, I first, I last) {
  const int before = static_cast<int>(min(max(first - token, I(0)), I(kVec)));
  const int after = static_cast<int>(min(max(token + kVec - last, I(0)), I(kVec)));
  // Two shifts each: one by 32 bits would be undefined.
  return (kAllValid << 4 * before << 4 * before) & (kAllValid >> 4 * after >> 4 * after);
}

// The same as packed.cuh has it, a bit each: the product brings the four bytes' bits together in the uppermost byte.
__device__ __forceinline__ unsigned live_bits(uint32_t bytes) { return bytes * 0x01020408u >> 24; }

// How a group of packs may be read.
enum class Reach {
  kWhole,    // every token of every pack is live
  kOver,     // packs may hold tokens of a neighbouring row, which are memory of the tensor: packs with a live token are read whole
  kLimited,  // only live tokens may be touched
};

// Aligned vectors. Plain loads rather than __ldg: that is inline assembly, which takes no constant offset.
__device__ __forceinline__ void load_pack(uint32_t& out, const uint8_t* at) { out = *reinterpret_cast<const uint32_t*>(at); }
__device__ __forceinline__ void load_pack(Pack<float>& out, const float* at) {
  const float4 u = *reinterpret_cast<const float4*>(at);
  out = {{u.x, u.y, u.z, u.w}};
}
__device__ __forceinline__ void load_pack(Pack<double>& out, const double* at) {
  const double2 a = *reinterpret_cast<const double2*>(at), b = *(reinterpret_cast<const double2*>(at) + 1);
  out = {{a.x, a.y, b.x, b.y}};
}
// Two-byte elements stay as they are, in the low half of the pack, until widen().
__device__ __forceinline__ void load_pack(Pack<float>& out, const uint16_t* at) {
  const float2 u = *reinterpret_cast<const float2*>(at);
  out.v[0] = u.x, out.v[1] = u.y;
}

__device__ __forceinline__ void store_vector(float* at, const Pack<float>& x) {
  __stcg(reinterpret_cast<float4*>(at), make_float4(x.v[0], x.v[1], x.v[2], x.v[3]));
}
__device__ __forceinline__ void store_vector(double* at, const Pack<double>& x) {
  __stcg(reinterpret_cast<double2*>(at), make_double2(x.v[0], x.v[1]));
  __stcg(reinterpret_cast<double2*>(at) + 1, make_double2(x.v[2], x.v[3]));
}

// One vector per pack that has a live token, of elements of type E.
template <typename E, typename X, int K, typename At>
__device__ __forceinline__ void load_vectors(X (&out)[K], const Operand& x, const At& at, const uint32_t (&live)[K]) {
  const E* data = static_cast<const E*>(x.data) + at.vector_offset(x);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (live[k] != 0) load_pack(out[k], data + k * at.vector_stride(x));
  }
}

// First half of a load: issues the loads of all packs of one operand. What is not live is not read, or reads as anything.
template <typename T, int K, typename At>
__device__ __forceinline__ void issue(Pack<T> (&out)[K], const Operand& x, const At& at, const uint32_t (&live)[K], Reach reach,
                                      const Access& access, unsigned bit) {
  if (reach != Reach::kLimited && (access.native & bit) != 0) {
    load_vectors<T>(out, x, at, live);
  } else if (sizeof(T) == sizeof(float) && bit != kGradBit && reach != Reach::kLimited && (access.half & bit) != 0) {  // gradients come in T
    if constexpr (sizeof(T) == sizeof(float)) load_vectors<uint16_t>(out, x, at, live);
  } else {
    const At rare = at.rare();
    const bool vec = (access.aligned & bit) != 0;
#pragma unroll
    for (int k = 0; k < K; ++k) out[k] = unpack(fetch<T>(x, rare.offset(x, k), rare.element_stride(x), live_bits(live[k]), vec), x.dtype);
  }
}

// Second half.
template <typename T, int K>
__device__ __forceinline__ void widen(Pack<T> (&out)[K], const Operand& x, Reach reach, const Access& access, unsigned bit) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (reach == Reach::kLimited || (access.half & bit) == 0) return;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const RawPack<T> raw = {{__float_as_uint(out[k].v[0]), __float_as_uint(out[k].v[1])}};
      out[k] = x.dtype == DType::kBFloat16 ? unpack(raw, DType::kBFloat16) : unpack(raw, DType::kFloat16);
    }
  }
}

// The weights of pack k in T, integers as 0 or 1; read where they are used (a floating mask is rare, and the line is in cache): kept,
// they would cost every launch registers.
template <typename T, typename Params, typename At>
__device__ __forceinline__ Pack<T> load_weights(const Params& p, const At& at, int k, uint32_t live, const Access& access) {
  const At rare = at.rare();
  const bool vec = (access.aligned & kMaskBit) != 0;
  return unpack(fetch<T>(p.mask, rare.offset(p.mask, k), rare.element_stride(p.mask), live_bits(live), vec), p.mask.dtype);
}

// One bound of the clip range for pack k: read where it is used, for the same reason, or the one number.
template <typename T, typename At>
__device__ __forceinline__ Pack<T> load_bound(const Operand& x, T number, const At& at, int k, uint32_t live, const Access& access,
                                              unsigned bit) {
  if (x.data == nullptr) return {{number, number, number, number}};
  const At rare = at.rare();
  const bool vec = (access.aligned & bit) != 0;
  return unpack(fetch<T>(x, rare.offset(x, k), rare.element_stride(x), live_bits(live), vec), x.dtype);
}

// What one launch's rules have in common.
template <typename T, Form kForm>
struct Rules {
  T low, high;

  __device__ __forceinline__ Rules(const LossOptions&, T low_, T high_, T) : low(low_), high(high_) {}
  template <typename At>
  __device__ __forceinline__ Rule<T, kForm> of_pack(const LossOptions&, const At&, int, uint32_t, const Access&) const {
    return {low, high};
  }
};
template <typename T>
struct Rules<T, Form::kOptions> {
  T low, high, limit;

  __device__ __forceinline__ Rules(const LossOptions&, T low_, T high_, T limit_) : low(low_), high(high_), limit(limit_) {}
  template <typename At>
  __device__ __forceinline__ Rule<T, Form::kOptions> of_pack(const LossOptions& o, const At& at, int k, uint32_t live,
                                                            const Access& access) const {
    return {load_bound(o.clip_lows, low, at, k, live, access, kLowBit), load_bound(o.clip_highs, high, at, k, live, access, kHighBit),
            TokenOptions<T>(o, limit)};
  }
};

// Where a thread's packs lie in plain tensors (Access::direct).
template <typename T, Form kForm>
struct Cursor {
  static constexpr bool kClip = kForm == Form::kClipped;
  const T *values, *old_values, *returns;
  const uint8_t* mask;  // where has_mask
  bool has_mask;
  int64_t value_step, old_value_step, return_step, mask_step;  // from pack to pack

  template <typename Params, typename At>
  __device__ __forceinline__ Cursor(const Params& p, const At& at) {
    values = static_cast<const T*>(p.values.data) + at.vector_offset(p.values);
    returns = static_cast<const T*>(p.returns.data) + at.vector_offset(p.returns);
    has_mask = p.mask.data != nullptr;
    mask = static_cast<const uint8_t*>(p.mask.data) + at.vector_offset(p.mask);
    value_step = at.vector_stride(p.values), return_step = at.vector_stride(p.returns), mask_step = at.vector_stride(p.mask);
    if constexpr (kClip) {
      old_values = static_cast<const T*>(p.old_values.data) + at.vector_offset(p.old_values);
      old_value_step = at.vector_stride(p.old_values);
    }
  }

  __device__ __forceinline__ void advance(int packs) {
    values += packs * value_step, returns += packs * return_step, mask += packs * mask_step;
    if constexpr (kClip) old_values += packs * old_value_step;
  }
};

// The operands of a thread's packs. All loads are issued before the first is used.
template <typename T, Form kForm, int K>
struct Tokens {
  static constexpr bool kClip = kForm != Form::kPlain;  // there may be old values
  Pack<T> values[K], old_values[K], returns[K];
  uint32_t mask[K];  // a byte per token, not 0 where it is valid; of tokens that are not live, anything

  __device__ __forceinline__ void load(const Cursor<T, kForm>& at) {
    if (at.has_mask) {
#pragma unroll
      for (int k = 0; k < K; ++k) load_pack(mask[k], at.mask + k * at.mask_step);
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      load_pack(values[k], at.values + k * at.value_step);
      load_pack(returns[k], at.returns + k * at.return_step);
      if constexpr (kClip) load_pack(old_values[k], at.old_values + k * at.old_value_step);
    }
  }

  // Anything. An absent mask is all ones.
  template <typename Params, typename At>
  __device__ __forceinline__ void load(const Params& p, const At& at, const uint32_t (&live)[K], Reach reach, const Access& access) {
    const bool mask_bytes = reach != Reach::kLimited && (access.native & kMaskBit) != 0;
#pragma unroll
    for (int k = 0; k < K; ++k) mask[k] = p.mask.data == nullptr ? kAllValid : 0u;
    if (mask_bytes) load_vectors<uint8_t>(mask, p.mask, at, live);
    issue(values, p.values, at, live, reach, access, kValuesBit);
    issue(returns, p.returns, at, live, reach, access, kReturnsBit);
    if (kClip && (kForm == Form::kClipped || p.options.clip)) issue(old_values, p.old_values, at, live, reach, access, kOldValuesBit);
    if (p.mask.data != nullptr && !mask_bytes) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const Pack<T> w = load_weights<T>(p, at, k, live[k], access);
#pragma unroll
        for (int i = 0; i < kVec; ++i) mask[k] |= w.v[i] != T(0) ? 1u << (8 * i) : 0u;
      }
    }
    widen(values, p.values, reach, access, kValuesBit);
    widen(returns, p.returns, reach, access, kReturnsBit);
    if (kClip && (kForm == Form::kClipped || p.options.clip)) widen(old_values, p.old_values, reach, access, kOldValuesBit);
  }

  __device__ __forceinline__ auto loss(int k, int i, const Rule<T, kForm>& rule) const {
    return rule.loss(i, values[k].v[i], kClip ? old_values[k].v[i] : T(0), returns[k].v[i]);
  }

  // A byte of 0 or 1 per token of pack k.
  __device__ __forceinline__ uint32_t valid(int k, uint32_t live) const {
    // A byte is not 0 if its low seven bits carry into the high one, or that is set itself.
    return (((mask[k] & 0x7f7f7f7fu) + 0x7f7f7f7fu) | mask[k]) >> 7 & live;
  }

  // Whether all tokens are surely valid: looks only at the lowest bits, which bool masks have.
  __device__ __forceinline__ bool all_valid() const {
    uint32_t common = kAllValid;
#pragma unroll
    for (int k = 0; k < K; ++k) common &= mask[k];
    return common == kAllValid;
  }
};

__device__ __forceinline__ bool is_weighted(const Operand& mask) { return mask.data != nullptr && is_floating(mask.dtype); }

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
  bool over = false;      // rows: a pack at the edge of a row that is neither first nor last lies in the tensor as a whole
  int threads = 0, blocks = 0;
  int lanes = 0;          // rows: lanes that share a row; columns: lanes side by side, each with kVec columns
  int splits = 1;         // parts that a row is cut into; with more than one, row partials go through the workspace
  int64_t items = 0;      // (row or tile of columns, part)
  int64_t groups = 0;     // rows: groups of lanes in the grid
  Access access;
  PackPhase phase;
};

template <typename T>
struct Scratch {
  unsigned* ticket;
  WarpPartial<T>* warps;
  RowPartial<T>* rows;  // splits > 1 only: [row * splits + split]; or words of bits, [item * kSeenWords + word]
};
constexpr int64_t kScratchAlign = 256;

int64_t num_warps(const ForwardPlan& plan) { return static_cast<int64_t>(plan.blocks) * (plan.threads / kWarp); }

template <typename T>
Scratch<T> carve(void* workspace, const ForwardPlan& plan) {
  char* at = static_cast<char*>(workspace);
  WarpPartial<T>* warps = reinterpret_cast<WarpPartial<T>*>(at + kScratchAlign);
  return {reinterpret_cast<unsigned*>(at), warps, reinterpret_cast<RowPartial<T>*>(warps + num_warps(plan))};
}

// Twice the loss clamp; infinity without.
template <typename T, Form kForm>
__device__ __forceinline__ T loss_limit(const ValueLossParams& p) {
  return kForm == Form::kOptions && p.options.clamp ? 2 * static_cast<T>(load_number(p.loss_clamp)) : T(INFINITY);
}

// kRows: as in Sums. kStep: as in Place. Its functions are for all lanes of the warp together.
template <typename T, Form kForm, int kRows, int kStep>
struct Walker {
  static constexpr int K = kPacks<T, kRows, kForm>;
  using At = Place<(kRows > 1), kStep>;
  using Packs = Tokens<T, kForm, K>;
  const ValueLossParams& p;
  const ForwardPlan& plan;
  T* scratch;  // for warp_sum_slots
  Sums<T, kRows> sums;
  double total = 0;  // of the lane's slot: what was flushed
  const Rules<T, kForm> rules;
  bool weighted, per_token, row_means;  // row_means: the sums of single rows are needed
  int passes = 0;  // since the last flush

  __device__ __forceinline__ Walker(const ValueLossParams& params, const ForwardPlan& plan_, T* warp_scratch)
      : p(params),
        plan(plan_),
        scratch(warp_scratch),
        rules(params.options, kForm != Form::kPlain ? static_cast<T>(load_number(params.clip_low)) : T(0),
              kForm != Form::kPlain ? static_cast<T>(load_number(params.clip_high)) : T(0), loss_limit<T, kForm>(params)) {
    weighted = is_weighted(p.mask);
    per_token = p.reduction == Reduction::kNone;
    row_means = p.reduction == Reduction::kSeqMeanTokenMean;
  }

  // `count` passes over whole packs of plain tensors, side by side from `at` on. They have code of their own, in which a load's registers
  // are known: were the paths to meet behind the loads, each register would be moved.
  __device__ __forceinline__ void direct_passes(At at, int count) {
    Cursor<T, kForm> cursor(p, at);
    const Rule<T, kForm> rule = {rules.low, rules.high};
    for (; count > 0; --count, cursor.advance(K)) {
      make_room();
      Packs tokens;
      tokens.load(cursor);
      const bool all_valid = !cursor.has_mask || __all_sync(kAllLanes, tokens.all_valid());
      if (all_valid) {
        if (!sums.centred) centre_on(tokens.values[0].v[0], tokens.returns[0].v[0], 0);
        sums.valid_bytes += K * kAllValid;
        sums.seen = kAllValid;
#pragma unroll
        for (int k = 0; k < K; ++k) accumulate_pack<false, true>(tokens, k, kAllValid, {}, rule);
      } else {
#pragma unroll
        for (int k = 0; k < K; ++k) masked_pack<false>(tokens, k, tokens.valid(k, kAllValid), {}, rule);
      }
      if (per_token) {
#pragma unroll
        for (int k = 0; k < K; ++k) store(tokens, at, k, kAllValid, all_valid ? kAllValid : tokens.valid(k, kAllValid), {}, rule);
        at.time += K * at.step();
      }
    }
  }

  // One pass over anything.
  __device__ __forceinline__ void pass(const At& place, const uint32_t (&live)[K], Reach reach) {
    const At at = place.rare();
    Packs tokens;
    tokens.load(p, at, live, reach, plan.access);
    make_room();
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const uint32_t valid = tokens.valid(k, live[k]);
      const Rule<T, kForm> rule = rules.of_pack(p.options, at, k, live[k], plan.access);
      Pack<T> weights = {};
      if (weighted) {
        weights = load_weights<T>(p, at, k, live[k], plan.access);
        masked_pack<true>(tokens, k, valid, weights, rule);
      } else {
        masked_pack<false>(tokens, k, valid, weights, rule);
      }
      if (per_token) store(tokens, at, k, live[k], valid, weights, rule);
    }
  }

  // Makes room for one more pass in the sums.
  __device__ __forceinline__ void make_room() {
    if (passes == Geometry::kFlushPasses) {
      settle(sums, weighted);
      flush();
      passes = 0;
    }
    ++passes;
  }

  // Moves the settled sums from the lanes to `total`.
  __device__ __forceinline__ void flush() {
    total += warp_sum_slots(sums.slot, scratch);
#pragma unroll
    for (T& x : sums.slot) x = T(0);
  }

  template <bool kWeighted>
  __device__ __forceinline__ void masked_pack(const Packs& tokens, int k, uint32_t valid, const Pack<T>& weights,
                                              const Rule<T, kForm>& rule) {
    if (__all_sync(kAllLanes, valid == 0)) return;
    if (!sums.centred) choose_centre(tokens.values[k], tokens.returns[k], valid);
    sums.valid_bytes += valid;
    sums.seen |= valid;
    if (!kWeighted && __all_sync(kAllLanes, valid == kAllValid)) {
      accumulate_pack<false, true>(tokens, k, valid, weights, rule);
    } else {
      accumulate_pack<kWeighted, false>(tokens, k, valid, weights, rule);
    }
  }

  template <bool kWeighted, bool kAll>
  __device__ __forceinline__ void accumulate_pack(const Packs& x, int k, uint32_t valid, const Pack<T>& weights,
                                                  const Rule<T, kForm>& rule) {
    accumulate<kWeighted, kAll>(sums, x.values[k], x.old_values[k], x.returns[k], weights, valid, rule);
  }

  // kNone: the losses of pack k, computed once more rather than kept.
  __device__ __forceinline__ void store(const Packs& tokens, const At& at, int k, uint32_t live, uint32_t valid, const Pack<T>& weights,
                                        const Rule<T, kForm>& rule) {
    Pack<T> losses;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const T twice = tokens.loss(k, i, rule).twice();
      losses.v[i] = (valid & 1u << (8 * i)) != 0 ? T(0.5) * (weighted ? weights.v[i] * twice : twice) : T(0);
    }
    Output x = p.tokens;
    x.dtype = accumulation_dtype<T>;
    const At rare = at.rare();
    store4(x, rare.offset(x, k), rare.element_stride(x), losses, live_bits(live), (plan.access.native & kOutputBit) != 0);
  }

  __device__ __forceinline__ void centre_on(T value, T ret, int lane) {
    sums.centre_value = __shfl_sync(kAllLanes, value, lane);
    sums.centre_return = __shfl_sync(kAllLanes, ret, lane);
    sums.centred = true;
  }

  // The first valid token of the first lane that has one.
  __device__ __forceinline__ void choose_centre(const Pack<T>& v, const Pack<T>& ret, uint32_t valid) {
    T cv = v.v[kVec - 1], cr = ret.v[kVec - 1];
#pragma unroll
    for (int i = kVec - 2; i >= 0; --i) {
      const bool on = (valid & 1u << (8 * i)) != 0;
      cv = on ? v.v[i] : cv;
      cr = on ? ret.v[i] : cr;
    }
    centre_on(cv, cr, __ffs(__ballot_sync(kAllLanes, valid != 0)) - 1);
  }

  __device__ __forceinline__ void begin_rows() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums.row_loss[r] = sums.row_weight[r] = T(0);
    sums.seen = 0;
  }

  // What the warp leaves.
  __device__ __forceinline__ void leave(WarpPartial<T>& out) {
    flush();
    const T negated_min = warp_max(-sums.value_min), max = warp_max(sums.value_max);
    const uint32_t tokens = warp_sum(sums.tokens), sequences = warp_sum(sums.sequences);
    const T weight = weighted ? group_sum(sums.settled_weight, kWarp) : static_cast<T>(tokens);
    const T means = row_means ? group_sum(sums.row_means, kWarp) : T(0);
    if (lane_id() < kSumSlots) out.slot[lane_id()] = static_cast<T>(total);
    // The rest by two lanes, as neighbouring vectors: one store.
    Pack<T> rest = {{-negated_min, max, sums.centre_value, sums.centre_return}};
    if (lane_id() == 1) {
      rest.v[0] = weight, rest.v[1] = means;
      put_count(rest.v[2], tokens), put_count(rest.v[3], sequences);
    }
    if (lane_id() < 2) store_vector(&out.value_min + kVec * lane_id(), rest);
  }
};

template <typename T>
__device__ __forceinline__ void clear_tokens(const Output& x, int64_t first, int64_t end, int step) {
  for (int64_t t = first; t < end; t += step) static_cast<T*>(x.data)[t * x.time_stride] = T(0);
}

// Rows along time: `lanes` lanes of a warp share a row, or a part of one. kStep: all lanes do.
template <typename T, Form kForm, int kStep>
__device__ __forceinline__ void walk_rows(Walker<T, kForm, 1, kStep>& walker, RowPartial<T>* row_partials) {
  constexpr int K = kPacks<T, 1, kForm>;
  const ValueLossParams& p = walker.p;
  const ForwardPlan& plan = walker.plan;
  const Layout& layout = p.layout;
  const bool packed = layout.cu_seqlens != nullptr;
  const int lanes = kStep != 0 ? kWarp : plan.lanes;
  const int lane = lane_id() & (lanes - 1);
  const unsigned group_lanes = (lanes == kWarp ? kAllLanes : (1u << lanes) - 1) << (lane_id() & ~(lanes - 1));
  const int pass_tokens = kVec * K * lanes;

  // The lanes of a warp go round together, also those whose group has no item left.
  int64_t item = blockIdx.x * (blockDim.x / static_cast<unsigned>(lanes)) + threadIdx.x / static_cast<unsigned>(lanes);
  for (; kStep != 0 ? item < plan.items : __any_sync(kAllLanes, item < plan.items); item += plan.groups) {
    const bool present = kStep != 0 || item < plan.items;
    int64_t row = item;
    int part = 0;
    if (plan.splits > 1) {  // few rows: the item fits 32 bits
      row = static_cast<unsigned>(item) / static_cast<unsigned>(plan.splits);
      part = static_cast<unsigned>(item) % static_cast<unsigned>(plan.splits);
    }
    Segment segment = {0, present ? layout.seq_len : 0};
    if (packed && present) segment = load_segment(layout, row);
    const int lead = plan.phase.lead(packed ? segment.start : row);
    // Token 0 of the part, on a pack boundary; the live tokens of the part are [first, last).
    int64_t origin = -lead;
    int first = lead, last = static_cast<int>(segment.length) + lead;
    if (plan.splits > 1) {
      const int64_t share = round_up(ceil_div(segment.length, plan.splits), pass_tokens);
      origin += part * share;
      const int64_t rest = segment.length - origin;
      first = part == 0 ? lead : 0;
      last = static_cast<int>(max(part == plan.splits - 1 || rest < share ? rest : share, int64_t{0}));
    }

    walker.begin_rows();
    for (int base = 0; __any_sync(kAllLanes, base < last);) {
      const int token = base + kVec * lane;
      const typename Walker<T, kForm, 1, kStep>::At at = {packed ? 0 : row, segment.start + origin + token, kVec * lanes, 0};
      const int whole = base >= first ? (last - base) / pass_tokens : 0;  // passes that begin here
      // In double the second copy of the pass would take more registers than there are, with options too.
      if constexpr (sizeof(T) == sizeof(float) && kForm != Form::kOptions) {
        if (plan.access.direct && __all_sync(kAllLanes, whole > 0)) {
          const int run = kStep != 0 ? whole : 1;  // the other rows of the warp may be shorter
          walker.direct_passes(at, run);
          base += run * pass_tokens;
          continue;
        }
      }
      const bool inner = packed ? segment.start >= kVec && segment.start + segment.length + kVec <= layout.seq_len
                                : row > 0 && row + 1 < layout.num_seqs;
      const bool over = ((first | last) & (kVec - 1)) == 0 || (plan.over && inner);
      uint32_t live[K];
#pragma unroll
      for (int k = 0; k < K; ++k) live[k] = live_bytes(token + kVec * k * lanes, first, last);
      walker.pass(at, live, whole > 0 ? Reach::kWhole : over ? Reach::kOver : Reach::kLimited);
      base += pass_tokens;
    }
    settle(walker.sums, walker.weighted);
    if (walker.per_token && packed) {
      // Tokens before the first segment and after the last belong to none, but are written all the same.
      if (item == 0) clear_tokens<T>(p.tokens, lane, segment.start, lanes);
      if (item == plan.items - 1) clear_tokens<T>(p.tokens, segment.start + segment.length + lane, layout.seq_len, lanes);
    }

    const bool seen = (__ballot_sync(kAllLanes, walker.sums.seen != 0) & group_lanes) != 0;
    T loss = 0, weight = 0;
    if (walker.row_means) {
      loss = group_sum(walker.sums.row_loss[0], lanes);
      weight = group_sum(walker.sums.row_weight[0], lanes);
    }
    if (lane == 0 && present) {
      if (plan.splits > 1) {
        row_partials[item] = {loss, weight, seen ? T(1) : T(0), T(0)};
      } else {
        end_row(p, row, loss, weight, seen, walker.sums.sequences, walker.sums.row_means);
      }
    }
  }
}

// Time-major: a tile is kVec * lanes columns; the other threads of the block take every further time step.
template <typename T, Form kForm>
__device__ __forceinline__ void walk_columns(Walker<T, kForm, kVec, 0>& walker, RowPartial<T>* row_partials) {
  constexpr int K = kPacks<T, kVec, kForm>;
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
    uint32_t live_columns = 0;
#pragma unroll
    for (int i = 0; i < kVec; ++i) live_columns |= column + my_column + i * column_step < columns ? 1u << (8 * i) : 0u;

    walker.begin_rows();
    int direct = 0;
    if constexpr (kForm != Form::kOptions) {
      const bool whole_tile = plan.access.direct && column + tile <= columns && stop > start;
      direct = whole_tile ? static_cast<int>((stop - start) / (K * time_lanes)) : 0;
      walker.direct_passes({column + my_column, start + time_lane, time_lanes, column_step}, direct);
    }
    for (int64_t base = start + static_cast<int64_t>(direct) * (K * time_lanes); base < stop; base += K * time_lanes) {
      uint32_t live[K];
      bool whole = true;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        live[k] = base + time_lane + k * time_lanes < stop ? live_columns : 0u;
        whole = whole && live[k] == kAllValid;
      }
      walker.pass({column + my_column, base + time_lane, time_lanes, column_step}, live, whole ? Reach::kWhole : Reach::kLimited);
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
    static_assert(kTile <= Geometry::kMaxThreads, "a thread per column of a tile");
    const int c = static_cast<int>(threadIdx.x);
    const bool mine = c < tile && column + c < columns;
    T loss = 0, weight = 0;
    bool seen = false;
    if (mine) {
      for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) {
        loss += tile_loss[warp][c];
        weight += tile_weight[warp][c];
        seen = seen || tile_seen[warp][c] != 0;
      }
    }
    if (plan.splits > 1 && !walker.row_means) {
      const uint32_t bits = __ballot_sync(kAllLanes, seen);
      if (c < tile && lane_id() == 0) reinterpret_cast<uint32_t*>(row_partials)[item * kSeenWords + c / kWarp] = bits;
    } else if (plan.splits > 1) {
      if (mine) row_partials[(column + c) * plan.splits + part] = {loss, weight, seen ? T(1) : T(0), T(0)};
    } else if (mine) {
      end_row(p, column + c, loss, weight, seen, walker.sums.sequences, walker.sums.row_means);
    }
    __syncthreads();
  }
}

// --- finish ------------------------------------------------------------------------------------------------------------------

// The sums over all tokens: the additive moments under their own index, and one more.
constexpr int kRowMeans = kValueMin;  // shares no storage with the min, which is no sum
constexpr int kNumSums = kRowMeans + 1;
static_assert(kNumSums <= 2 * kSumSlots && kSequences + 1 == kRowMeans, "additive moments first");

struct FinishStorage {
  double sum[Geometry::kMaxThreads / kWarp][2 * kSumSlots];
  double value_min[Geometry::kMaxThreads / kWarp], value_max[Geometry::kMaxThreads / kWarp];
};

// Tiles of columns that were split and left bits: a group of lanes merges the parts of one word.
__device__ __forceinline__ uint32_t count_columns(const ForwardPlan& plan, const uint32_t* words) {
  int lanes = 1;
  while (lanes < plan.splits && lanes < kWarp) lanes *= 2;
  const int lane = lane_id() & (lanes - 1), used = static_cast<int>(ceil_div(kVec * plan.lanes, kWarp));
  const int64_t count = plan.items / plan.splits * used;
  uint32_t sequences = 0;
  for (int64_t base = 0; base < count; base += static_cast<int>(blockDim.x) / lanes) {
    const int64_t i = base + static_cast<int>(threadIdx.x) / lanes, tile = i / used;
    uint32_t bits = 0;
    if (i < count) {
#pragma unroll 4
      for (int part = lane; part < plan.splits; part += lanes) {
        bits |= __ldcg(words + (tile * plan.splits + part) * kSeenWords + (i - tile * used));
      }
    }
    for (int o = lanes / 2; o > 0; o /= 2) bits |= __shfl_xor_sync(kAllLanes, bits, o);
    if (lane == 0) sequences += __popc(bits);
  }
  return sequences;
}

// Rows that were split: a group of lanes merges the parts of one row, lane by lane, then across the group.
template <typename T>
__device__ __forceinline__ void finish_rows(const ValueLossParams& p, const ForwardPlan& plan, const RowPartial<T>* partials,
                                            double (&sum)[2 * kSumSlots]) {
  int lanes = 1;
  while (lanes < plan.splits && lanes < kWarp) lanes *= 2;
  const int lane = lane_id() & (lanes - 1);
  const int64_t rows = p.layout.num_seqs, groups = static_cast<int>(blockDim.x) / lanes;
  const bool sums_needed = p.reduction == Reduction::kSeqMeanTokenMean;
  uint32_t sequences = 0;
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
    if (lane == 0 && row < rows) end_row(p, row, loss, weight, seen > 0, sequences, sum[kRowMeans]);
  }
  sum[kSequences] += sequences;
}

template <typename T>
__device__ __forceinline__ WarpPartial<T> load_partial(const WarpPartial<T>* at) {
  static_assert(sizeof(WarpPartial<T>) % sizeof(uint4) == 0, "read in whole vectors");
  WarpPartial<T> x;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(x) / sizeof(uint4)); ++i) {
    reinterpret_cast<uint4*>(&x)[i] = __ldcg(reinterpret_cast<const uint4*>(at) + i);
  }
  return x;
}

// Moments about 0 from sums about a centre.
__device__ __forceinline__ void add_uncentred(double& sum, double& sum_sq, double weight, double centre, double first, double second) {
  const double uncentred = first + weight * centre;
  sum += uncentred;
  sum_sq += second + centre * (first + uncentred);
}

// Every warp leaves its partial; the block that finishes last combines them in a fixed order and writes moments, loss and residuals.
// warp_scratch: for warp_sum_slots of double.
template <typename T, Form kForm, int kRows, int kStep>
__device__ __forceinline__ void finish(Walker<T, kForm, kRows, kStep>& walker, const Scratch<T>& scratch, double* warp_scratch) {
  __shared__ FinishStorage storage;
  const ValueLossParams& p = walker.p;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
  walker.leave(scratch.warps[static_cast<int>(blockIdx.x) * warps + warp]);
  if (!is_last_block(scratch.ticket)) return;

  double sum[2 * kSumSlots] = {}, value_min = INFINITY, value_max = -INFINITY;
#pragma unroll 1  // partials in flight would cost the whole kernel registers
  for (int i = static_cast<int>(threadIdx.x); i < static_cast<int>(gridDim.x) * warps; i += static_cast<int>(blockDim.x)) {
    const WarpPartial<T> x = load_partial(scratch.warps + i);
    const double weight = x.weight, centre_value = x.centre_value, centre_return = x.centre_return;
    const double value = x.slot[kValueSlot], ret = x.slot[kReturnSlot];
    sum[kTokens] += get_count(x.tokens), sum[kWeight] += weight;
    sum[kSequences] += get_count(x.sequences), sum[kRowMeans] += x.row_means;
    sum[kLoss] += x.slot[kLossSlot], sum[kClipped] += x.slot[kClippedSlot], sum[kOutside] += x.slot[kOutsideSlot];
    add_uncentred(sum[kValue], sum[kValueSq], weight, centre_value, value, x.slot[kValueSqSlot]);
    add_uncentred(sum[kReturn], sum[kReturnSq], weight, centre_return, ret, x.slot[kReturnSqSlot]);
    add_uncentred(sum[kError], sum[kErrorSq], weight, centre_return - centre_value, ret - value, x.slot[kErrorSqSlot]);
    value_min = fmin(value_min, static_cast<double>(x.value_min)), value_max = fmax(value_max, static_cast<double>(x.value_max));
  }
  if (walker.plan.splits > 1) {
    if (kRows > 1 && !walker.row_means) {
      sum[kSequences] += count_columns(walker.plan, reinterpret_cast<const uint32_t*>(scratch.rows));
    } else {
      finish_rows(p, walker.plan, scratch.rows, sum);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    double slots[kSumSlots];
#pragma unroll
    for (int i = 0; i < kSumSlots; ++i) slots[i] = sum[half * kSumSlots + i];
    const double x = warp_sum_slots(slots, warp_scratch);
    if (lane_id() < kSumSlots) storage.sum[warp][half * kSumSlots + lane_id()] = x;
  }
  value_min = -warp_max(-value_min), value_max = warp_max(value_max);
  if (lane_id() == 0) storage.value_min[warp] = value_min, storage.value_max[warp] = value_max;
  __syncthreads();
  if (threadIdx.x != 0) return;

  for (int w = 1; w < warps; ++w) {
    value_min = fmin(value_min, storage.value_min[w]), value_max = fmax(value_max, storage.value_max[w]);
  }
#pragma unroll
  for (int i = 0; i < kNumSums; ++i) {
    sum[i] = storage.sum[0][i];
    for (int w = 1; w < warps; ++w) sum[i] += storage.sum[w][i];
  }
  sum[kLoss] *= 0.5;
#pragma unroll
  for (int i = 0; i <= kSequences; ++i) p.stats[i] = sum[i];
  p.stats[kValueMin] = value_min;
  p.stats[kValueMax] = value_max;

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
  p.residuals[kClipLow] = walker.rules.low;
  p.residuals[kClipHigh] = walker.rules.high;
  if (kForm == Form::kOptions && p.options.clamp) *p.clamp_residual = load_number(p.loss_clamp);
}

// How threads go through the tokens.
enum class Walk {
  kLongRows,   // 32 lanes per row; in float only, where the loads it saves are worth a kernel
  kShortRows,  // rows along time, any number of lanes
  kColumns,    // threads across sequences
};

template <typename T, Form kForm, Walk kWalk>
__device__ __forceinline__ void value_loss_block(const ValueLossParams& p, const ForwardPlan& plan, const Scratch<T>& scratch) {
  __shared__ __align__(16) double scratch_of_warp[Geometry::kMaxThreads / kWarp][kSlotScratch<double>];
  double* warp_scratch = scratch_of_warp[threadIdx.x / kWarp];
  constexpr int kRows = kWalk == Walk::kColumns ? kVec : 1, kStep = kWalk == Walk::kLongRows ? kVec * kWarp : 0;
  Walker<T, kForm, kRows, kStep> walker(p, plan, reinterpret_cast<T*>(warp_scratch));
  if constexpr (kWalk == Walk::kColumns) {
    walk_columns(walker, scratch.rows);
  } else {
    walk_rows(walker, scratch.rows);
  }
  finish(walker, scratch, warp_scratch);
}

// Without clipping old_values are not read: less traffic and fewer registers, hence a template argument.
template <typename T, bool kClip, Walk kWalk>
__global__ void __launch_bounds__(Geometry::kMaxThreads, 2)
value_loss_kernel(const ValueLossParams p, const ForwardPlan plan, const Scratch<T> scratch) {
  value_loss_block<T, kClip ? Form::kClipped : Form::kPlain, kWalk>(p, plan, scratch);
}

// With options (Form::kOptions). They are numbers and branches that are the same for a whole launch; rows of any length share one kernel.
template <typename T, Walk kWalk>
__global__ void __launch_bounds__(Geometry::kMaxThreads, 2)
value_loss_options_kernel(const ValueLossParams p, const ForwardPlan plan, const Scratch<T> scratch) {
  value_loss_block<T, Form::kOptions, kWalk>(p, plan, scratch);
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
  access.direct = true;
  for (const Lines& x : all) {
    const bool input = x.data != nullptr && x.bit != kOutputBit && x.bit != kGradBit;
    access.direct = access.direct && (!input || (access.native & x.bit) != 0);
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
                       lines_of(p.options.clip_lows, kLowBit, packed, plan.columns),
                       lines_of(p.options.clip_highs, kHighBit, packed, plan.columns), lines_of(tokens, kOutputBit, packed, plan.columns)};
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
  plan.over = true;
  for (const Lines& x : all) plan.over = plan.over && (x.data == nullptr || packed || x.row_stride >= kVec);
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
  plan.blocks = static_cast<int>(ceil_div(warps * kWarp, plan.threads));
  plan.groups = static_cast<int64_t>(plan.blocks) * (plan.threads / plan.lanes);
  return plan;
}

template <typename T>
void launch_with_options(const ValueLossParams& p, const ForwardPlan& plan, const Scratch<T>& scratch, cudaStream_t stream) {
  if (plan.columns) {
    value_loss_options_kernel<T, Walk::kColumns><<<plan.blocks, plan.threads, 0, stream>>>(p, plan, scratch);
  } else {
    value_loss_options_kernel<T, Walk::kShortRows><<<plan.blocks, plan.threads, 0, stream>>>(p, plan, scratch);
  }
}

template <typename T, bool kClip>
void launch_forward(const ValueLossParams& p, const ForwardPlan& plan, const Scratch<T>& scratch, cudaStream_t stream) {
  if (plan.columns) {
    value_loss_kernel<T, kClip, Walk::kColumns><<<plan.blocks, plan.threads, 0, stream>>>(p, plan, scratch);
  } else if (sizeof(T) == sizeof(float) && plan.lanes == kWarp) {
    if constexpr (sizeof(T) == sizeof(float)) {
      value_loss_kernel<T, kClip, Walk::kLongRows><<<plan.blocks, plan.threads, 0, stream>>>(p, plan, scratch);
    }
  } else {
    value_loss_kernel<T, kClip, Walk::kShortRows><<<plan.blocks, plan.threads, 0, stream>>>(p, plan, scratch);
  }
}

}  // namespace

template <typename T>
int64_t value_loss_workspace(const ValueLossParams& p) {
  const ForwardPlan plan = plan_forward<T>(p);
  int64_t rows = 0;
  if (plan.splits > 1) {
    const bool bits = plan.columns && p.reduction != Reduction::kSeqMeanTokenMean;
    rows = bits ? plan.items * kSeenWords * static_cast<int64_t>(sizeof(uint32_t))
                : p.layout.num_seqs * plan.splits * static_cast<int64_t>(sizeof(RowPartial<T>));
  }
  return kScratchAlign + num_warps(plan) * static_cast<int64_t>(sizeof(WarpPartial<T>)) + rows;
}

template <typename T>
void launch_value_loss(const ValueLossParams& p, void* workspace, cudaStream_t stream) {
  const ForwardPlan plan = plan_forward<T>(p);
  const Scratch<T> scratch = carve<T>(workspace, plan);
  // The ticket is cleared before every launch, since memory fresh from the allocator holds anything. A counter that the last block resets
  // would have to outlive the call: then launches on two streams, or replays of graphs that captured it, would count each other's blocks.
  // One block needs no ticket.
  if (plan.blocks > 1) cudaMemsetAsync(scratch.ticket, 0, sizeof(*scratch.ticket), stream);
  switch (form_of(p.options)) {
    case Form::kPlain: launch_forward<T, false>(p, plan, scratch, stream); break;
    case Form::kClipped: launch_forward<T, true>(p, plan, scratch, stream); break;
    case Form::kOptions: launch_with_options<T>(p, plan, scratch, stream); break;
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
  bool plain = false;            // plain tensors, and one factor for all tokens of a row
  bool residual_vectors = false;  // the residuals are aligned for double2
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

template <typename T, Form kForm>
__device__ __forceinline__ T loss_limit(const ValueLossBackwardParams& p) {
  return kForm == Form::kOptions && p.options.clamp ? 2 * static_cast<T>(*p.loss_clamp) : T(INFINITY);
}

// Elementwise: grad = grad_loss * scale * w * dl/dv, one pass of packs per group of lanes.
template <typename T, Form kForm>
__device__ __forceinline__ void value_loss_backward_block(const ValueLossBackwardParams& p, const BackwardPlan& plan) {
  constexpr bool kClip = kForm != Form::kPlain;
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
  // Packed: tokens outside of all segments belong to no sequence.
  const int64_t segments_begin = packed ? segment_bound(layout, 0) : 0;
  const int64_t segments_end = packed ? segment_bound(layout, layout.num_seqs) : plan.length;
  const bool one_grad = p.grad_loss.seq_stride == 0 && p.grad_loss.time_stride == 0;
  double2 head = {p.residuals[kScale], 0.0};
  if (kClip) {
    static_assert(kScale == 0 && kClipLow == 1, "one vector");
    head = plan.residual_vectors ? __ldg(reinterpret_cast<const double2*>(p.residuals)) : double2{p.residuals[kScale], p.residuals[kClipLow]};
  }
  const T low = static_cast<T>(head.y), high = kClip ? static_cast<T>(p.residuals[kClipHigh]) : T(0);
  const Rules<T, kForm> rules(p.options, low, high, loss_limit<T, kForm>(p));
  double scale = head.x;
  if (one_grad) scale *= load<double>(p.grad_loss.data, p.grad_loss.dtype, 0);
  if (p.seq_scale && !packed && !plan.across_seqs) scale *= p.residuals[kSeqScale + row];
  const T row_scale = static_cast<T>(scale);

  const Place<false> at = {row, first, pack_step, 0};
  Tokens<T, kForm, K> tokens;
  if constexpr (kForm != Form::kOptions) {
    if (plan.plain && full && base >= segments_begin && base + K * pack_step <= segments_end) {
      tokens.load(Cursor<T, kForm>(p, at));
      const bool has_mask = p.mask.data != nullptr;
      const Rule<T, kForm> rule = {low, high};
      T* out = static_cast<T*>(p.grad_values.data) + at.vector_offset(p.grad_values);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        Pack<T> grad;
#pragma unroll
        for (int i = 0; i < kVec; ++i) grad.v[i] = row_scale * tokens.loss(k, i, rule).grad();
        if (has_mask) {
#pragma unroll
          for (int i = 0; i < kVec; ++i) grad.v[i] = (tokens.mask[k] & 0xffu << (8 * i)) != 0 ? grad.v[i] : T(0);
        }
        store_vector(out + k * pack_step, grad);
      }
      return;
    }
  }

  uint32_t live[K];
#pragma unroll
  for (int k = 0; k < K; ++k) live[k] = full ? kAllValid : live_bytes<int64_t>(first + k * pack_step, 0, plan.length);
  const Reach reach = full ? Reach::kWhole : Reach::kLimited;
  Pack<T> grad[K] = {};
  if (!one_grad) issue(grad, p.grad_loss, at, live, reach, plan.access, kGradBit);
  tokens.load(p, at, live, reach, plan.access);
  const bool weighted = is_weighted(p.mask);

#pragma unroll
  for (int k = 0; k < K; ++k) {
    uint32_t valid = tokens.valid(k, live[k]);
    const Rule<T, kForm> rule = rules.of_pack(p.options, at, k, live[k], plan.access);
    Pack<T> factor, out;  // d(sum of grad_loss * loss) / d(l)
#pragma unroll
    for (int i = 0; i < kVec; ++i) factor.v[i] = one_grad ? row_scale : row_scale * grad[k].v[i];
    if (weighted) {
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
      out.v[i] = (valid & 1u << (8 * i)) != 0 ? factor.v[i] * tokens.loss(k, i, rule).grad() : T(0);
    }
    const Output& x = p.grad_values;
    store4(x, at.offset(x, k), out, live_bits(live[k]), (plan.access.aligned & kOutputBit) != 0);
  }
}

template <typename T, bool kClip>
__global__ void __launch_bounds__(Geometry::kBackwardThreads, 4)
value_loss_backward_kernel(const ValueLossBackwardParams p, const BackwardPlan plan) {
  value_loss_backward_block<T, kClip ? Form::kClipped : Form::kPlain>(p, plan);
}

// Three blocks per multiprocessor: options take more than the 128 registers of four.
template <typename T>
__global__ void __launch_bounds__(Geometry::kBackwardThreads, 3)
value_loss_options_backward_kernel(const ValueLossBackwardParams p, const BackwardPlan plan) {
  value_loss_backward_block<T, Form::kOptions>(p, plan);
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
    p.options.clip_lows = exchanged(p.options.clip_lows), p.options.clip_highs = exchanged(p.options.clip_highs);
  }
  const Lines all[] = {lines_of(p.values, kValuesBit, false), lines_of(p.old_values, kOldValuesBit, false),
                       lines_of(p.returns, kReturnsBit, false), lines_of(p.mask, kMaskBit, false), lines_of(p.grad_loss, kGradBit, false),
                       lines_of(p.options.clip_lows, kLowBit, false), lines_of(p.options.clip_highs, kHighBit, false),
                       lines_of(p.grad_values, kOutputBit, false)};
  bool flat = !p.seq_scale;
  for (const Lines& x : all) flat = flat && flattens(x, plan.length);
  if (flat) plan.length *= plan.rows, plan.rows = 1;
  plan.access = access_to<T>(all, align(all, plan.phase));
  const bool one_grad = p.grad_loss.seq_stride == 0 && p.grad_loss.time_stride == 0;
  plan.plain = plan.access.direct && (plan.access.native & kOutputBit) != 0 && one_grad && !(p.seq_scale && (packed || plan.across_seqs));
  plan.residual_vectors = reinterpret_cast<uintptr_t>(p.residuals) % sizeof(double2) == 0;
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
  switch (form_of(p.options)) {
    case Form::kPlain:
      value_loss_backward_kernel<T, false><<<static_cast<unsigned>(blocks), Geometry::kBackwardThreads, 0, stream>>>(p, plan);
      break;
    case Form::kClipped:
      value_loss_backward_kernel<T, true><<<static_cast<unsigned>(blocks), Geometry::kBackwardThreads, 0, stream>>>(p, plan);
      break;
    case Form::kOptions:
      value_loss_options_backward_kernel<T><<<static_cast<unsigned>(blocks), Geometry::kBackwardThreads, 0, stream>>>(p, plan);
      break;
  }
}

template void launch_value_loss_backward<float>(const ValueLossBackwardParams&, cudaStream_t);
template void launch_value_loss_backward<double>(const ValueLossBackwardParams&, cudaStream_t);

}  // namespace fused_critic::cuda
