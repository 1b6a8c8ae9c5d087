// First-order linear recurrences over sequences, parallel in time: every token is an affine map x -> a x + b of one carried scalar x
// (math/affine.h), and a scan of the maps gives the x that enters each token. The kernels know nothing of what the maps mean; an operator
// is a
//
//   struct Op {
//     using Scalar;                              // accumulation type
//     using Carry;                               // T, the type of x: Scalar if absent, or Pair<Scalar> for two recurrences side by side
//     struct Params;                             // POD: every kernel's argument
//     static constexpr bool kReverse;            // true: scanned from the last token of a sequence to its first
//     static constexpr bool kConstantFactor;     // true: every token has the same a, whose powers() are known, and none is skipped
//     static constexpr bool kCentred;            // false if absent. true: x is large where it varies little, so maps count x from origin(c);
//                                                // c: the centre() of the first thread of those that scan together
//     explicit Op(const Params&);                // or Op(const Params&, int64_t seq), where sequences differ in more than their tokens
//     template <typename At> struct Raw;         // what fetch() loads for the At::kTokens tokens of one thread: At::Numbers and At::Flags
//     struct Token;                              // what emit() needs of a token
//     Raw<At> fetch(const At&) const;            // loads only, so that all of a tile are in flight before the first is used
//     // Decodes the tokens, walks them as if x = 0 entered the first, and returns their map. A token that is skipped or outside of the
//     // sequence is the identity.
//     Affine<T> compose(const At&, const Raw<At>&, [Scalar centre,] Token (&)[At::kTokens]) const;
//     // x, or x - origin(centre), enters the first; At writes live tokens only.
//     void emit(const At&, const Token (&)[At::kTokens], T x) const;
//     const FactorPowers<T>& powers() const;     // kConstantFactor only
//     Scalar centre(const At&, const Raw<At>&) const;  // kCentred only
//     T origin(Scalar centre) const;                   // kCentred only
//     T initial(int64_t seq) const;              // the x that enters the sequence; 0 if not kReverse
//     void finish(int64_t seq, T leaving) const; // called once per sequence with the x that leaves it
//   };
//
// All arrays of tokens are in memory order. Deterministic: every combination has a fixed order that depends on the problem alone.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../math/affine.h"
#include "../math/pair.h"
#include "packed.cuh"

namespace fused_critic::cuda {

constexpr int kWarpSizeLog2 = 5;
constexpr int kWarpSize = 1 << kWarpSizeLog2;
constexpr unsigned kFullWarp = 0xffffffffu;

// What the host knows of a call's tensors. For rows:
enum class Access {
  kPlain,    // regular, and T is float, numbers are of type T and flags one byte wide; for columns: those types
  kRegular,  // every pack of every operand is aligned, and either wholly inside of its row or not at all
  kGeneral,  // anything
};

struct ScanGeometry {
  static constexpr int kSubTileTokens = kWarpSize * kVec;  // one pack per lane

  // Rows along contiguous time. Four warps: enough for a row of 1024 tokens in one tile, and few enough to wait for one another cheaply.
  static constexpr int kRowWarps = 4;
  static constexpr int kRowThreads = kRowWarps * kWarpSize;
  // At most 96 registers a thread: a tile's tokens fit without spills, and 20 warps per SM hide the loads. Warps that walk rows alone keep
  // the addresses of several tiles, the access code of run-time types needs its own: at most 128, and whatever it takes for double.
  static constexpr int row_min_blocks(size_t scalar, Access access, int warps = kRowWarps) {
    return access == Access::kPlain && warps == kRowWarps ? 5 : (scalar == sizeof(float) ? 4 : 2);
  }
  // Sub-tiles per warp and tile: two hide each other's shuffles; a third only adds registers. One where types are known at run
  // time only: the access code is large.
  static constexpr int sub_tiles(Access access) { return access == Access::kPlain ? 2 : 1; }
  // Up to here a warp walks a row alone, in at most four steps: no barrier, and other rows' warps hide the latency.
  static constexpr int kWarpRowTokens = 512;

  // Few long rows: a row is cut into chunks of whole tiles, one per block.
  static constexpr int kSplitMaxRows = 128;        // with more rows, a block each fills the largest GPUs without reading the inputs twice
  static constexpr int kSplitMaxPackedRows = 16;   // the host knows no segment's length: each gets the blocks of the longest possible
  static constexpr int kSplitMinTiles = 4;         // shorter rows are done before a second launch would start
  static constexpr int kSplitMaxChunks = 256;      // per row: bounds what a block reads of its predecessors to two maps a thread

  // Columns (time-major): a thread per sequence and chunk of time.
  static constexpr int kColumnWarps = 8;
  static constexpr int kColumnThreads = kColumnWarps * kWarpSize;
  // At most 128 registers a thread of float: a chunk's tokens stay in registers from compose() to emit().
  static constexpr int column_min_blocks(size_t scalar) { return scalar == sizeof(float) ? 2 : 1; }
  // Steps of time per thread, all of whose loads are in flight together: as many as fit, fewer where the access code is large, a token
  // has a factor of its own, or the carry is a pair. A power of two.
  static constexpr int column_tokens(Access access, bool constant_factor, bool pair) {
    return access == Access::kPlain && constant_factor ? 16 : (pair ? 4 : 8);
  }

  static constexpr int64_t kMaxGrid = (int64_t{1} << 31) - 1;
};
static_assert(ScanGeometry::kWarpRowTokens >= ScanGeometry::kSubTileTokens, "rows of up to one sub-tile belong to the warp kernels");
static_assert(ScanGeometry::kSplitMaxRows * ScanGeometry::kSplitMaxChunks <= ScanGeometry::kMaxGrid, "a block per chunk must fit the grid");
static_assert(ScanGeometry::kRowThreads * ScanGeometry::row_min_blocks(sizeof(float), Access::kPlain) <= 1024 &&
                  ScanGeometry::kColumnThreads * ScanGeometry::column_min_blocks(sizeof(float)) <= 1024,
              "sm_75 holds 1024 threads per SM");

template <typename Op, typename = void>
struct CarryType {
  using type = typename Op::Scalar;
};
template <typename Op>
struct CarryType<Op, std::void_t<typename Op::Carry>> {
  using type = typename Op::Carry;
};
template <typename Op>
using CarryOf = typename CarryType<Op>::type;

template <typename Op, typename = void>
constexpr bool kIsCentred = false;
template <typename Op>
constexpr bool kIsCentred<Op, std::void_t<decltype(Op::kCentred)>> = Op::kCentred;

// Powers of a factor, each rounded once, as the errors of products of products add up: of up to kVec - 1 tokens, and of 2^d packs.
template <typename T>
struct FactorPowers {
  T tokens[kVec], packs[kWarpSizeLog2 + 1];
};

template <typename T>
FUSED_CRITIC_HD FactorPowers<T> factor_powers(double a) {
  FactorPowers<T> powers;
  double power = 1;
#pragma unroll
  for (int i = 0; i < kVec; ++i, power *= a) powers.tokens[i] = static_cast<T>(power);
#pragma unroll
  for (int d = 0; d <= kWarpSizeLog2; ++d, power *= power) powers.packs[d] = static_cast<T>(power);
  return powers;
}

template <typename T>
__device__ __forceinline__ FactorPowers<Pair<T>> pair_of(const FactorPowers<T>& first, const FactorPowers<T>& second) {
  FactorPowers<Pair<T>> pairs;
#pragma unroll
  for (int i = 0; i < kVec; ++i) pairs.tokens[i] = {first.tokens[i], second.tokens[i]};
#pragma unroll
  for (int d = 0; d <= kWarpSizeLog2; ++d) pairs.packs[d] = {first.packs[d], second.packs[d]};
  return pairs;
}

template <typename Op>
__device__ __forceinline__ Op op_of(const typename Op::Params& params, int64_t seq) {
  if constexpr (std::is_constructible_v<Op, const typename Op::Params&, int64_t>) {
    return Op(params, seq);
  } else {
    return Op(params);
  }
}

// --- operands ------------------------------------------------------------------------------------------------------------------

// data + i * step in one instruction; and no expression to the compiler, which would spread the sum out and repeat it for every access.
template <typename P>
__device__ __forceinline__ P* advance(P* data, int64_t i, int64_t step) {
  P* at;
  asm("mad.lo.s64 %0, %1, %2, %3;" : "=l"(at) : "l"(i), "l"(step), "l"(data));
  return at;
}

// The same with i = 1.
template <typename P>
__device__ __forceinline__ P* advance(P* data, int64_t step) {
  P* at;
  asm("add.s64 %0, %1, %2;" : "=l"(at) : "l"(data), "l"(step));
  return at;
}

// An operand or output as the kernels see it: token t of row r lies row_bytes * r + time_bytes * t after data. vec: pack_aligned() to the
// reference phase of the launch. Packed sequences: a segment's first token takes the place of the row's index.
struct alignas(16) ScanInput {
  const void* data = nullptr;
  int64_t row_bytes = 0, time_bytes = 0;
  DType dtype = DType::kFloat32;
  bool vec = false;
  __device__ explicit operator bool() const { return data != nullptr; }
  __device__ __forceinline__ const char* row(int64_t r) const { return advance(static_cast<const char*>(data), r, row_bytes); }
};

struct alignas(16) ScanOutput {
  void* data = nullptr;
  int64_t row_bytes = 0, time_bytes = 0;
  bool vec = false;
  __device__ explicit operator bool() const { return data != nullptr; }
  __device__ __forceinline__ char* row(int64_t r) const { return advance(static_cast<char*>(data), r, row_bytes); }
};

template <bool kReverse, int N>
__device__ constexpr int in_scan_order(int i) {
  return kReverse ? N - 1 - i : i;
}

// A byte per element, non-zero where the element is.
template <typename T>
__device__ __forceinline__ uint32_t flag_bytes(const RawPack<T>& raw, DType dtype) {
  if (dtype == DType::kInt8) return raw.word[0];
  const Pack<T> p = unpack<T>(raw, dtype);
  uint32_t bytes = 0;
#pragma unroll
  for (int i = 0; i < kVec; ++i) bytes |= p.v[i] != T(0) ? 1u << (8 * i) : 0u;
  return bytes;
}

// As fetch_scalar, walking one address by one step in bytes: loops over tiles keep those two of every operand, where the addresses of all
// elements in all sizes would be kept, and spilled.
template <typename T>
__device__ __forceinline__ RawPack<T> fetch_strided(const char* at, DType dtype, int64_t step, unsigned live) {
  RawPack<T> raw = {};
  switch (dtype_size(dtype)) {
    case 4:
#pragma unroll
      for (int i = 0; i < kVec; ++i, at = advance(at, step))
        if (live >> i & 1) raw.word[i] = __ldg(reinterpret_cast<const uint32_t*>(at));
      break;
    case 2:
#pragma unroll
      for (int i = 0; i < kVec; ++i, at = advance(at, step))
        if (live >> i & 1) raw.word[i / 2] |= uint32_t{__ldg(reinterpret_cast<const uint16_t*>(at))} << (i % 2 * 16);
      break;
    case 1:
#pragma unroll
      for (int i = 0; i < kVec; ++i, at = advance(at, step))
        if (live >> i & 1) raw.word[0] |= uint32_t{__ldg(reinterpret_cast<const uint8_t*>(at))} << (i * 8);
      break;
    case 8:
#pragma unroll
      for (int i = 0; i < kVec; ++i, at = advance(at, step)) {
        if (!(live >> i & 1)) continue;
        const uint2 u = __ldg(reinterpret_cast<const uint2*>(at));
        if constexpr (sizeof(T) == 8) {
          raw.word[2 * i] = u.x, raw.word[2 * i + 1] = u.y;
        } else {
          raw.word[i] = dtype == DType::kInt64 ? u.x | u.y : __float_as_uint(static_cast<float>(__hiloint2double(u.y, u.x)));
        }
      }
      break;
  }
  return raw;
}

// One sequence: `packs` packs from the virtual start -lead on; pack j in scan order is the j-th from the end where the scan is reversed.
// `last`: the pack whose lane finishes the sequence (pack 0 of an empty one), -1 for none.
struct Row {
  int64_t seq, origin, length, packs, last;
  int lead;
};

constexpr uint32_t kAllSet = 0x01010101u;  // as flag_bytes

// The tokens of one lane in a row: kVec of them along time, from `first` on; bit i of `live`: token first + i belongs to the row.
// Where packs are regular, lanes that are not live load the row's first pack instead of branching; what they hold is of no account, but
// their flags are 0. At run time the usual types come first, the others by a switch. kFull: regular, and every lane of the tile is live.
template <typename T, Access kAccess, bool kFull>
struct RowTokens {
  static constexpr bool kPlain = kAccess == Access::kPlain, kRegular = kAccess != Access::kGeneral;
  static_assert(!kPlain || sizeof(T) == sizeof(float), "plain rows hold floats");
  static constexpr Access kTokenAccess = kAccess;
  static constexpr int kTokens = kVec;
  using Numbers = RawPack<T>;
  using Flags = uint32_t;  // flag_bytes
  int64_t origin, first;
  unsigned alive;

  __device__ __forceinline__ RowTokens() {}
  __device__ __forceinline__ RowTokens(const Row& row, int64_t first, bool inside)
      : origin(row.origin), first(kRegular && !kFull && !inside ? 0 : first),
        alive(!inside ? 0u : (kRegular ? kAllLive : live_elements(first, row.length))) {}
  __device__ __forceinline__ unsigned live() const { return kFull ? kAllLive : alive; }
  __device__ __forceinline__ bool live(int i) const { return (live() >> i & 1) != 0; }

  __device__ __forceinline__ bool vectorised(bool vec) const { return kRegular || (vec && live() == kAllLive); }

  // Row first, then token: the row's part is the same for every tile, the token's for every operand of a size.
  template <typename S>  // kVec elements
  __device__ __forceinline__ const S* aligned(const ScanInput& in) const {
    return reinterpret_cast<const S*>(in.row(origin) + first * int64_t{sizeof(S) / kVec});
  }

  __device__ __forceinline__ Numbers fetch(const ScanInput& in) const {
    if (kPlain || (vectorised(in.vec) && in.dtype == DType::kFloat32)) {
      const float4 u = __ldg(aligned<float4>(in));
      Numbers raw = {};
      raw.word[0] = __float_as_uint(u.x), raw.word[1] = __float_as_uint(u.y);
      raw.word[2] = __float_as_uint(u.z), raw.word[3] = __float_as_uint(u.w);
      return raw;
    }
    return fetch_other(in);
  }

  __device__ __forceinline__ Numbers fetch_other(const ScanInput& in) const {
    if (vectorised(in.vec)) return fetch_vector<T>(Operand{in.row(origin), in.dtype}, first);
    if (live() == 0) return {};
    return fetch_strided<T>(advance(in.row(origin), first, in.time_bytes), in.dtype, in.time_bytes, live());
  }

  __device__ __forceinline__ Flags fetch_present(const ScanInput& in) const {
    if (kPlain || (vectorised(in.vec) && in.dtype == DType::kInt8)) return __ldg(aligned<uint32_t>(in));
    return flag_bytes<T>(fetch_other(in), in.dtype);
  }

  // Zero where the operand is absent.
  __device__ __forceinline__ Numbers fetch_optional(const ScanInput& in) const { return in ? fetch(in) : Numbers{}; }
  __device__ __forceinline__ Flags fetch_flags(const ScanInput& in) const { return in ? fetch_present(in) : 0u; }

  // Inside the row and not masked; an absent mask masks nothing.
  __device__ __forceinline__ Flags fetch_valid(const ScanInput& mask) const {
    if constexpr (kRegular) {
      const Flags set = mask ? fetch_present(mask) : kAllSet;
      return live() != 0 ? set : 0u;
    } else {
      return mask ? fetch_present(mask) : ones_mask<T>(live()).word[0];
    }
  }

  __device__ __forceinline__ void numbers(const ScanInput& in, const Numbers& raw, T (&out)[kTokens]) const {
    Pack<T> p;
    if (kPlain || (sizeof(T) == sizeof(float) && in.dtype == DType::kFloat32)) {
      p = unpack<T>(raw, DType::kFloat32);
    } else {
      p = unpack<T>(raw, in.dtype);
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) out[i] = p.v[i];
  }

  __device__ __forceinline__ static bool test(Flags flags, int i) { return (flags & 0xffu << (8 * i)) != 0; }

  // Outputs of a scan are of type T.
  __device__ __forceinline__ void write(const ScanOutput& out, const T (&v)[kTokens]) const {
    if (vectorised(out.vec)) {
      char* at = out.row(origin) + first * int64_t{sizeof(T)};
      // The explicit store intrinsics keep the vector: a plain assignment has been seen to be split into scalar stores.
      if constexpr (sizeof(T) == sizeof(float)) {
        __stcg(reinterpret_cast<float4*>(at), make_float4(v[0], v[1], v[2], v[3]));
      } else {
        __stcg(reinterpret_cast<double2*>(at), make_double2(v[0], v[1]));
        __stcg(reinterpret_cast<double2*>(at) + 1, make_double2(v[2], v[3]));
      }
    } else {
      char* at = advance(out.row(origin), first, out.time_bytes);
#pragma unroll
      for (int i = 0; i < kTokens; ++i, at = advance(at, out.time_bytes))
        if (live() >> i & 1) *reinterpret_cast<T*>(at) = v[i];
    }
  }
};

// The tokens of one thread in a column: N of them from time `first` on, of which [0, length) exist. Neighbouring lanes hold neighbouring
// sequences.
template <typename T, Access kAccess, int N>
struct ColumnTokens {
  static constexpr bool kPlain = kAccess == Access::kPlain;
  static constexpr Access kTokenAccess = kAccess;
  static constexpr int kTokens = N;
  struct Numbers {
    T v[N];
  };
  struct Flags {
    bool v[N];
  };
  int64_t origin, first, length;  // length 0: the column does not exist

  __device__ __forceinline__ bool live(int i) const { return first + i >= 0 && first + i < length; }
  __device__ __forceinline__ bool full() const { return first >= 0 && first + N <= length; }

  // Elements of storage type S, converted; 0 where not live.
  template <typename S, typename R, typename F>
  __device__ __forceinline__ R fetch_as(const ScanInput& in, F&& convert) const {
    R raw;
    const char* at = advance(in.row(origin), first, in.time_bytes);
    if (__builtin_expect(full(), true)) {
#pragma unroll
      for (int i = 0; i < N; ++i, at = advance(at, in.time_bytes)) raw.v[i] = convert(__ldg(reinterpret_cast<const S*>(at)));
    } else {
      raw = {};
#pragma unroll
      for (int i = 0; i < N; ++i, at = advance(at, in.time_bytes))
        if (live(i)) raw.v[i] = convert(__ldg(reinterpret_cast<const S*>(at)));
    }
    return raw;
  }

  __device__ __forceinline__ Numbers fetch(const ScanInput& in) const {
    const auto number = [](auto v) { return static_cast<T>(v); };
    const auto flag = [](auto v) { return v != 0 ? T(1) : T(0); };
    if constexpr (kPlain) return fetch_as<T, Numbers>(in, number);
    switch (in.dtype) {
      case DType::kFloat64: return fetch_as<double, Numbers>(in, number);
      case DType::kFloat32: return fetch_as<float, Numbers>(in, number);
      case DType::kBFloat16: return fetch_as<__nv_bfloat16, Numbers>(in, [](auto v) { return static_cast<T>(__bfloat162float(v)); });
      case DType::kFloat16: return fetch_as<__half, Numbers>(in, [](auto v) { return static_cast<T>(__half2float(v)); });
      case DType::kInt8: return fetch_as<signed char, Numbers>(in, flag);
      case DType::kInt16: return fetch_as<short, Numbers>(in, flag);
      case DType::kInt32: return fetch_as<int, Numbers>(in, flag);
      case DType::kInt64: return fetch_as<long long, Numbers>(in, flag);
    }
    return Numbers{};
  }

  __device__ __forceinline__ Flags fetch_present(const ScanInput& in) const {
    if constexpr (kPlain) {
      return fetch_as<signed char, Flags>(in, [](signed char v) { return v != 0; });
    } else {
      const Numbers raw = fetch(in);
      Flags set;
#pragma unroll
      for (int i = 0; i < N; ++i) set.v[i] = raw.v[i] != T(0);
      return set;
    }
  }

  // Zero where the operand is absent.
  __device__ __forceinline__ Numbers fetch_optional(const ScanInput& in) const { return in ? fetch(in) : Numbers{}; }
  __device__ __forceinline__ Flags fetch_flags(const ScanInput& in) const { return in ? fetch_present(in) : Flags{}; }

  // Inside the column and not masked; an absent mask masks nothing.
  __device__ __forceinline__ Flags fetch_valid(const ScanInput& mask) const {
    if (mask) return fetch_present(mask);
    Flags set;
#pragma unroll
    for (int i = 0; i < N; ++i) set.v[i] = live(i);
    return set;
  }

  __device__ __forceinline__ void numbers(const ScanInput&, const Numbers& raw, T (&out)[kTokens]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = raw.v[i];
  }

  __device__ __forceinline__ static bool test(const Flags& flags, int i) { return flags.v[i]; }

  // Outputs of a scan are of type T.
  __device__ __forceinline__ void write(const ScanOutput& out, const T (&v)[kTokens]) const {
    char* at = advance(out.row(origin), first, out.time_bytes);
    if (__builtin_expect(full(), true)) {
#pragma unroll
      for (int i = 0; i < N; ++i, at = advance(at, out.time_bytes)) __stcs(reinterpret_cast<T*>(at), v[i]);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i, at = advance(at, out.time_bytes))
        if (live(i)) __stcs(reinterpret_cast<T*>(at), v[i]);
    }
  }
};

// --- rows ------------------------------------------------------------------------------------------------------------------------

struct RowLayout {
  Layout layout;
  PackPhase phase;                 // of the reference tensor; vec flags are relative to it
  int64_t packs = 0;               // regular rows: packs per row
  int width_log2 = kWarpSizeLog2;  // warp kernels: lanes per row
  int64_t chunks = 1;              // chunk kernels: chunks per row,
  int64_t chunk_packs = 0;         // and packs per chunk
};

template <Access kAccess>
__device__ __forceinline__ Row row_at(const RowLayout& rows, int64_t seq) {
  const Layout& l = rows.layout;
  if constexpr (kAccess != Access::kGeneral) {
    return {seq, seq, l.seq_len, rows.packs, rows.packs - 1, 0};
  } else {
    Row row{seq, seq, l.seq_len, 0, 0, 0};
    if (l.cu_seqlens != nullptr) {
      const bool narrow = l.cu_seqlens_dtype == DType::kInt32;
      const auto bound = [&](int64_t i) -> int64_t {
        const int64_t at = narrow ? int64_t{static_cast<const int32_t*>(l.cu_seqlens)[i]} : static_cast<const int64_t*>(l.cu_seqlens)[i];
        return at < 0 ? 0 : (at > l.seq_len ? l.seq_len : at);
      };
      row.origin = bound(seq);
      const int64_t end = bound(seq + 1);
      row.length = end > row.origin ? end - row.origin : 0;
    }
    row.lead = rows.phase.lead(row.origin);
    row.packs = row.length == 0 ? 0 : (row.length + row.lead + kVec - 1) / kVec;
    row.last = row.packs > 0 ? row.packs - 1 : 0;
    return row;
  }
}

// The lanes of a warp as groups of `width` neighbours (a power of two), each with a scan of its own.
struct LaneGroup {
  int lane, width;
  __device__ __forceinline__ int up_clamp() const { return (kWarpSize - width) << 8; }  // shfl.sync's operand c
};

// One step of an inclusive scan: the map of the lane kDistance below is applied first; lanes without one keep theirs.
// By PTX for float, because only there can the shuffle's own in-range predicate guard the update.
template <int kDistance>
__device__ __forceinline__ void scan_step(Affine<float>& m, LaneGroup g) {
  asm volatile(
      "{\n\t.reg .pred p;\n\t.reg .f32 a, b;\n\t"
      "shfl.sync.up.b32 a|p, %0, %2, %3, 0xffffffff;\n\t"
      "shfl.sync.up.b32 b|p, %1, %2, %3, 0xffffffff;\n\t"
      "@p fma.rn.f32 %1, %0, b, %1;\n\t"
      "@p mul.rn.f32 %0, %0, a;\n\t}"
      : "+f"(m.a), "+f"(m.b)
      : "n"(kDistance), "r"(g.up_clamp()));
}

template <int kDistance>
__device__ __forceinline__ void scan_step(Affine<double>& m, LaneGroup g) {
  const Affine<double> before{__shfl_up_sync(kFullWarp, m.a, kDistance, g.width), __shfl_up_sync(kFullWarp, m.b, kDistance, g.width)};
  if (g.lane >= kDistance) m = compose(m, before);
}

template <int kDistance, typename T>
__device__ __forceinline__ void scan_step(Affine<Pair<T>>& m, LaneGroup g) {
  Affine<T> first{m.a.first, m.b.first}, second{m.a.second, m.b.second};
  scan_step<kDistance>(first, g);
  scan_step<kDistance>(second, g);
  m = {{first.a, second.a}, {first.b, second.b}};
}

// The same where every map of the step has the same a.
template <int kDistance>
__device__ __forceinline__ void scan_step(float& b, float a, LaneGroup g) {
  asm volatile(
      "{\n\t.reg .pred p;\n\t.reg .f32 t;\n\t"
      "shfl.sync.up.b32 t|p, %0, %2, %3, 0xffffffff;\n\t"
      "@p fma.rn.f32 %0, %1, t, %0;\n\t}"
      : "+f"(b)
      : "f"(a), "n"(kDistance), "r"(g.up_clamp()));
}

template <int kDistance>
__device__ __forceinline__ void scan_step(double& b, double a, LaneGroup g) {
  const double before = __shfl_up_sync(kFullWarp, b, kDistance, g.width);
  if (g.lane >= kDistance) b += a * before;
}

// The value of the lane below; `none` in the first lane.
__device__ __forceinline__ float from_below(float v, float none, LaneGroup g) {
  float out;
  asm volatile(
      "{\n\t.reg .pred p;\n\t"
      "shfl.sync.up.b32 %0|p, %1, 1, %3, 0xffffffff;\n\t"
      "@!p mov.f32 %0, %2;\n\t}"
      : "=&f"(out)
      : "f"(v), "f"(none), "r"(g.up_clamp()));
  return out;
}

__device__ __forceinline__ double from_below(double v, double none, LaneGroup g) {
  const double below = __shfl_up_sync(kFullWarp, v, 1, g.width);
  return g.lane == 0 ? none : below;
}

template <typename T>
__device__ __forceinline__ Pair<T> from_below(Pair<T> v, Pair<T> none, LaneGroup g) {
  return {from_below(v.first, none.first, g), from_below(v.second, none.second, g)};
}

// The value of the group's first lane.
template <typename T>
__device__ __forceinline__ T from_first(T v, LaneGroup g) {
  return __shfl_sync(kFullWarp, v, 0, g.width);
}

// The value of the group's last lane.
__device__ __forceinline__ float from_last(float v, LaneGroup g) {
  float out;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, %3, 0xffffffff;" : "=f"(out) : "f"(v), "r"(g.width - 1), "r"(g.up_clamp() | (kWarpSize - 1)));
  return out;
}

__device__ __forceinline__ double from_last(double v, LaneGroup g) { return __shfl_sync(kFullWarp, v, g.width - 1, g.width); }

template <typename T>
__device__ __forceinline__ Pair<T> from_last(Pair<T> v, LaneGroup g) {
  return {from_last(v.first, g), from_last(v.second, g)};
}

// x *= factor where `bits` holds any of kMask. By PTX for float: a product and a select would be two instructions.
template <int kMask>
__device__ __forceinline__ void multiply_if(float& x, float factor, int bits) {
  asm("{\n\t.reg .pred p;\n\t.reg .b32 t;\n\t"
      "and.b32 t, %2, %3;\n\t"
      "setp.ne.b32 p, t, 0;\n\t"
      "@p mul.rn.f32 %0, %0, %1;\n\t}"
      : "+f"(x)
      : "f"(factor), "r"(bits), "n"(kMask));
}

template <int kMask>
__device__ __forceinline__ void multiply_if(double& x, double factor, int bits) {
  if (bits & kMask) x *= factor;
}

// How maps combine over the lanes of a group: with their products ...
template <typename T>
struct AffineScan {
  LaneGroup group;
  __device__ __forceinline__ AffineScan(T, LaneGroup g) : group(g) {}

  // Inclusive scans of K sub-tiles, interleaved.
  template <int K, int kDistance = 1>
  __device__ __forceinline__ void scan(Affine<T> (&m)[K]) const {
    if constexpr (kDistance < kWarpSize) {
#pragma unroll
      for (int k = 0; k < K; ++k) scan_step<kDistance>(m[k], group);
      scan<K, 2 * kDistance>(m);
    }
  }
  __device__ __forceinline__ T factor(const Affine<T>& m) const { return m.a; }  // of one lane's map
  // Of an inclusive scan: the maps up to this lane; the map of all lanes, in the last lane.
  __device__ __forceinline__ Affine<T> through(const Affine<T>& m) const { return m; }
  __device__ __forceinline__ Affine<T> whole(const Affine<T>& m) const { return m; }
};

// ... or, where every token has the same factor, with that factor's powers: no products travel through the shuffles, and the a of the
// scanned maps are not kept up.
template <typename T>
struct PowerScan {
  LaneGroup group;
  const FactorPowers<T>& powers;
  T lanes;  // of the packs of the lanes up to this one

  __device__ __forceinline__ PowerScan(const FactorPowers<T>& p, LaneGroup g) : group(g), powers(p), lanes(p.packs[0]) {
    multiply_if<1>(lanes, p.packs[0], g.lane);
    multiply_if<2>(lanes, p.packs[1], g.lane);
    multiply_if<4>(lanes, p.packs[2], g.lane);
    multiply_if<8>(lanes, p.packs[3], g.lane);
    multiply_if<16>(lanes, p.packs[4], g.lane);
  }

  template <int K, int kLevel = 0>
  __device__ __forceinline__ void scan(Affine<T> (&m)[K]) const {
    if constexpr (kLevel < kWarpSizeLog2) {
#pragma unroll
      for (int k = 0; k < K; ++k) scan_step<(1 << kLevel)>(m[k].b, powers.packs[kLevel], group);
      scan<K, kLevel + 1>(m);
    }
  }
  __device__ __forceinline__ T factor(const Affine<T>&) const { return powers.packs[0]; }
  __device__ __forceinline__ Affine<T> through(const Affine<T>& m) const { return {lanes, m.b}; }
  __device__ __forceinline__ Affine<T> whole(const Affine<T>& m) const { return {powers.packs[kWarpSizeLog2], m.b}; }
};

// Hands one map per warp to every thread of the block. Ordered by the one barrier in exchange(): a warp reads the maps that were stored
// before it. Two buffers take turns, so none is needed against the next exchange: who overwrites a buffer is two exchanges on, hence past
// the barrier of the one between, which every reader of that buffer reaches only after its reads.
template <typename T, int kWarps>
struct RowShared {
  alignas(16) T a[2][kWarps], b[2][kWarps];
};

template <typename T, int kWarps>
struct WarpMaps {
  RowShared<T, kWarps>& shared;
  int buffer = 1;

  // `mine`: the warp's map, in its last lane. kFactors: the a are exchanged too.
  template <bool kFactors>
  __device__ __forceinline__ void exchange(const Affine<T>& mine) {
    buffer ^= 1;
    if (threadIdx.x % kWarpSize == kWarpSize - 1) {
      const int rank = threadIdx.x / kWarpSize;
      if constexpr (kFactors) shared.a[buffer][rank] = mine.a;
      shared.b[buffer][rank] = mine.b;
    }
    __syncthreads();
  }
  __device__ __forceinline__ Affine<T> map(int rank) const { return {shared.a[buffer][rank], shared.b[buffer][rank]}; }
};

// One warp's share of a tile: K sub-tiles of its row. For the lane's pack in the first of them: `first` is its first token, and `left`
// counts the packs from there to the end of the row, in scan order (0 or less: outside of it).
template <typename Op, Access kAccess, int K, bool kFull>
struct WarpTile {
  using T = CarryOf<Op>;
  using At = RowTokens<typename Op::Scalar, kAccess, kFull>;
  At at[K];
  typename Op::Token tokens[K][kVec];
  Affine<T> maps[K];  // they count x from the origin
  T origin = T(0);

  // Tokens, and the map of each lane's in `maps`.
  __device__ __forceinline__ void load(const Op& op, const Row& row, int64_t first, int64_t left, LaneGroup group) {
    typename Op::template Raw<At> raw[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      at[k] = At(row, first + (Op::kReverse ? -k : k) * kWarpSize * kVec, kFull || left > k * kWarpSize);
      raw[k] = op.fetch(at[k]);
    }
    if constexpr (kIsCentred<Op>) {
      const typename Op::Scalar centre = from_first(op.centre(at[0], raw[0]), group);
      origin = op.origin(centre);
#pragma unroll
      for (int k = 0; k < K; ++k) maps[k] = op.compose(at[k], raw[k], centre, tokens[k]);
    } else {
#pragma unroll
      for (int k = 0; k < K; ++k) maps[k] = op.compose(at[k], raw[k], tokens[k]);
    }
  }

  // After the scan: the map of all K sub-tiles, in the last lane. It counts x from zero.
  template <typename Scan>
  __device__ __forceinline__ Affine<T> whole(const Scan& scan) const {
    Affine<T> m = scan.whole(maps[0]);
#pragma unroll
    for (int k = 1; k < K; ++k) m = compose(scan.whole(maps[k]), m);
    if constexpr (kIsCentred<Op>) m = counted_from_zero(m, origin);
    return m;
  }

  // x between counting from zero and from the origin.
  __device__ __forceinline__ T from_origin(T x) const { return kIsCentred<Op> ? x - origin : x; }
  __device__ __forceinline__ T from_zero(T x) const { return kIsCentred<Op> ? x + origin : x; }
};

template <typename Op>
using ScanOf = std::conditional_t<Op::kConstantFactor, PowerScan<CarryOf<Op>>, AffineScan<CarryOf<Op>>>;

template <typename Op>
__device__ __forceinline__ ScanOf<Op> scan_of(const Op& op, LaneGroup group) {
  if constexpr (Op::kConstantFactor) {
    return {op.powers(), group};
  } else {
    return {CarryOf<Op>(1), group};
  }
}

// A tile of a row: kWarps warps with K sub-tiles each.
template <int kWarps, int K>
constexpr int kTilePacks = kWarps * K * kWarpSize;

// Where a lane is in a row: its pack of the first tile in scan order, see WarpTile.
template <typename Op, int kWarps, int K>
struct LanePosition {
  int64_t first, left;
  __device__ __forceinline__ LanePosition(const Row& row, int64_t begin, int64_t end, int lane) {
    const int64_t pack = begin + (kWarps == 1 ? 0 : threadIdx.x / kWarpSize) * K * kWarpSize + lane;
    first = (Op::kReverse ? row.packs - 1 - pack : pack) * kVec - row.lead;
    left = end - pack;
  }
  __device__ __forceinline__ void advance() {
    first += (Op::kReverse ? -1 : 1) * kTilePacks<kWarps, K> * kVec;
    left -= kTilePacks<kWarps, K>;
  }
};

// Scans one tile that x enters; returns the x that leaves it if there are `more`.
template <typename Op, Access kAccess, int kWarps, int K, bool kFull>
__device__ __forceinline__ CarryOf<Op> scan_tile(const Op& op, const ScanOf<Op>& scan, const Row& row, int64_t first, int64_t left,
                                                 int64_t last, bool more, CarryOf<Op> x, WarpMaps<CarryOf<Op>, kWarps>& warps) {
  using T = CarryOf<Op>;
  // A warp alone with one sub-tile knows x before it scans: the first lane's map takes it in, and the scan gives values instead of maps.
  constexpr bool kEarly = kWarps == 1 && K == 1;
  const LaneGroup group = scan.group;
  WarpTile<Op, kAccess, K, kFull> w;
  w.load(op, row, first, left, group);
  if constexpr (kEarly) {
    const T leaving = scan.factor(w.maps[0]) * w.from_origin(x) + w.maps[0].b;
    if (group.lane == 0) w.maps[0].b = leaving;
  }
  scan.scan(w.maps);
  T enter = x;  // of the warp's share
  if constexpr (kWarps > 1) {
    const Affine<T> mine = w.whole(scan);
    warps.template exchange<!Op::kConstantFactor>(mine);
    Affine<T> maps[kWarps];
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      maps[i] = warps.map(i);
      if (Op::kConstantFactor) maps[i].a = mine.a;
      x = maps[i](x);
      enter = i < static_cast<int>(threadIdx.x / kWarpSize) ? x : enter;
    }
  }
  enter = w.from_origin(enter);
  T entering[K], leaving[K];  // of this lane
#pragma unroll
  for (int k = 0; k < K; ++k) {
    leaving[k] = kEarly ? w.maps[k].b : scan.through(w.maps[k])(enter);
    entering[k] = from_below(leaving[k], enter, group);
    if (k < K - 1) enter = from_last(leaving[k], group);
  }
  if (kWarps == 1 && more) x = w.from_zero(from_last(leaving[K - 1], group));
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (w.at[k].live() != 0) op.emit(w.at[k], w.tokens[k], entering[k]);
    if (last == k * kWarpSize) op.finish(row.seq, w.from_zero(leaving[k]));
  }
  return x;
}

// Scans the packs [begin, end) of a row by kWarps warps, entered by x. At least one tile is walked, so an empty sequence is finished too.
template <typename Op, Access kAccess, int kWarps, int K>
__device__ __forceinline__ void scan_row(const Op& op, const ScanOf<Op>& scan, const Row& row, int64_t begin, int64_t end,
                                         CarryOf<Op> x, WarpMaps<CarryOf<Op>, kWarps>& warps) {
  constexpr int kPacks = kTilePacks<kWarps, K>;
  // Plain rows come here with a warp and one sub-tile only where it holds the whole row.
  constexpr bool kOneTile = kWarps == 1 && K == 1 && kAccess == Access::kPlain;
  LanePosition<Op, kWarps, K> at(row, begin, end, scan.group.lane);
  int64_t left = end - begin, last = at.left - (end - row.last);
  bool more;
  do {
    more = !kOneTile && left > kPacks;
    // The condition is the same for all warps that meet at a barrier, and for all lanes of a warp: a row that shares its warp is shorter.
    if (kAccess != Access::kGeneral && left >= kPacks) {
      x = scan_tile<Op, kAccess, kWarps, K, true>(op, scan, row, at.first, at.left, last, more, x, warps);
    } else {
      x = scan_tile<Op, kAccess, kWarps, K, false>(op, scan, row, at.first, at.left, last, more, x, warps);
    }
    at.advance();
    left -= kPacks;
    last -= kPacks;
  } while (more);
}

// kWarps 1: a warp walks a row, or several rows of up to 2^width_log2 packs share it; kRowWarps: a block walks a row.
template <typename Op, Access kAccess, int kWarps, int K>
__global__ void __launch_bounds__(ScanGeometry::kRowThreads, ScanGeometry::row_min_blocks(sizeof(typename Op::Scalar), kAccess, kWarps))
scan_rows_kernel(const typename Op::Params params, const RowLayout rows) {
  using T = CarryOf<Op>;
  __shared__ RowShared<T, kWarps> shared;
  const int width_log2 = kWarps == 1 ? rows.width_log2 : kWarpSizeLog2, width = 1 << width_log2;
  const int row_in_block = kWarps == 1 ? threadIdx.x >> width_log2 : 0;
  const int rows_per_block = kWarps == 1 ? ScanGeometry::kRowThreads >> width_log2 : 1;
  const int64_t num_rows = rows.layout.num_seqs, seq = int64_t{blockIdx.x} * rows_per_block + row_in_block;
  // Lanes without a row stay for the shuffles.
  const bool exists = kWarps > 1 || seq < num_rows;
  Row row = row_at<kAccess>(rows, exists ? seq : num_rows - 1);
  if (!exists) row.last = -1;
  const Op op = op_of<Op>(params, row.seq);
  const auto scan = scan_of(op, LaneGroup{static_cast<int>(threadIdx.x & (width - 1)), width});
  WarpMaps<T, kWarps> warps{shared};
  scan_row<Op, kAccess, kWarps, K>(op, scan, row, 0, exists ? row.packs : 0, op.initial(row.seq), warps);
}

// --- few long rows: chunks over blocks ---------------------------------------------------------------------------------------

// First launch: the map of every chunk that another follows, to maps[seq * chunks + chunk].
template <typename Op, Access kAccess, int K>
__global__ void __launch_bounds__(ScanGeometry::kRowThreads, ScanGeometry::row_min_blocks(sizeof(typename Op::Scalar), kAccess))
reduce_chunks_kernel(const typename Op::Params params, const RowLayout rows, Affine<CarryOf<Op>>* __restrict__ maps) {
  using T = CarryOf<Op>;
  constexpr int kWarps = ScanGeometry::kRowWarps;
  __shared__ RowShared<T, kWarps> shared;
  const int chunks = static_cast<int>(rows.chunks), chunk = blockIdx.x % chunks;
  const Row row = row_at<kAccess>(rows, blockIdx.x / chunks);
  const int64_t begin = chunk * rows.chunk_packs, end = begin + rows.chunk_packs;
  if (end >= row.packs) return;  // the last chunk has no successor

  const Op op = op_of<Op>(params, row.seq);
  const LaneGroup group{static_cast<int>(threadIdx.x % kWarpSize), kWarpSize};
  const auto scan = scan_of(op, group);
  WarpMaps<T, kWarps> warps{shared};
  LanePosition<Op, kWarps, K> at(row, begin, end, group.lane);
  Affine<T> acc;
  for (int64_t tile = begin; tile < end; tile += kTilePacks<kWarps, K>) {
    // A chunk that another follows consists of whole tiles.
    WarpTile<Op, kAccess, K, kAccess != Access::kGeneral> w;
    w.load(op, row, at.first, at.left, group);
    scan.scan(w.maps);
    warps.template exchange<true>(w.whole(scan));
#pragma unroll
    for (int i = 0; i < kWarps; ++i) acc = compose(warps.map(i), acc);
    at.advance();
  }
  if (threadIdx.x == 0) maps[blockIdx.x] = acc;
}

// Second launch: every block composes the maps before its chunk, in order, and scans the chunk. What it reads of `maps` is complete: the
// first launch precedes this one on the same stream.
template <typename Op, Access kAccess, int K>
__global__ void __launch_bounds__(ScanGeometry::kRowThreads, ScanGeometry::row_min_blocks(sizeof(typename Op::Scalar), kAccess))
scan_chunks_kernel(const typename Op::Params params, const RowLayout rows, const Affine<CarryOf<Op>>* __restrict__ maps) {
  using T = CarryOf<Op>;
  constexpr int kWarps = ScanGeometry::kRowWarps;
  __shared__ RowShared<T, kWarps> shared;
  const int chunks = static_cast<int>(rows.chunks), chunk = blockIdx.x % chunks;
  const Row row = row_at<kAccess>(rows, blockIdx.x / chunks);
  const int64_t begin = chunk * rows.chunk_packs;
  if (chunk > 0 && begin >= row.packs) return;

  const Op op = op_of<Op>(params, row.seq);
  const LaneGroup group{static_cast<int>(threadIdx.x % kWarpSize), kWarpSize};
  WarpMaps<T, kWarps> warps{shared};
  T x = op.initial(row.seq);
  const Affine<T>* maps_before = maps + (blockIdx.x - chunk);
  for (int first = 0; first < chunk; first += ScanGeometry::kRowThreads) {
    const int i = first + static_cast<int>(threadIdx.x);
    Affine<T> m[1];
    if (i < chunk) m[0] = maps_before[i];
    AffineScan<T>(T(1), group).scan(m);
    warps.template exchange<true>(m[0]);
#pragma unroll
    for (int rank = 0; rank < kWarps; ++rank) x = warps.map(rank)(x);
  }
  scan_row<Op, kAccess, kWarps, K>(op, scan_of(op, group), row, begin, min(begin + rows.chunk_packs, row.packs), x, warps);
}

// --- columns -------------------------------------------------------------------------------------------------------------------

// A thread holds N steps of one sequence; the warps of a block take neighbouring chunks of time of the same 32 sequences.
template <typename Op, Access kAccess, int N>
__global__ void __launch_bounds__(ScanGeometry::kColumnThreads, ScanGeometry::column_min_blocks(sizeof(typename Op::Scalar)))
scan_columns_kernel(const typename Op::Params params, const Layout layout) {
  using T = CarryOf<Op>;
  using At = ColumnTokens<typename Op::Scalar, kAccess, N>;
  const int64_t seq = int64_t{blockIdx.x} * kWarpSize + threadIdx.x;
  const bool exists = seq < layout.num_seqs;
  const Op op = op_of<Op>(params, exists ? seq : 0);
  __shared__ struct {
    T a[ScanGeometry::kColumnWarps][kWarpSize], b[ScanGeometry::kColumnWarps][kWarpSize];
  } shared[2];
  static_assert(N == 4 || N == 8 || N == 16, "powers of whole packs, remainders by masks");
  T chunk_factor = T(1);
  if constexpr (Op::kConstantFactor) chunk_factor = op.powers().packs[N == 4 ? 0 : (N == 8 ? 1 : 2)];
  const auto with_factor = [&](Affine<T> m) { return Op::kConstantFactor ? Affine<T>{chunk_factor, m.b} : m; };
  const int lane = threadIdx.x, rank = threadIdx.y, warps = blockDim.y;
  // Steps that do not exist come where they change nothing: after the last of a reversed scan, before the first of another, while x is 0.
  const int64_t lead = Op::kReverse ? 0 : -layout.seq_len & (N - 1);
  int buffer = 0;
  T x = exists ? op.initial(seq) : T(0);
  for (int64_t tile = 0; tile < layout.seq_len; tile += warps * N) {
    const int64_t step = tile + rank * N;
    const At at{seq, Op::kReverse ? layout.seq_len - N - step : step - lead, exists ? layout.seq_len : 0};
    typename Op::Token tokens[N];
    const typename Op::template Raw<At> raw = op.fetch(at);
    Affine<T> mine;
    T origin = T(0);
    if constexpr (kIsCentred<Op>) {  // alone in its chunk, so the centre is the thread's own
      const typename Op::Scalar centre = op.centre(at, raw);
      origin = op.origin(centre);
      mine = counted_from_zero(with_factor(op.compose(at, raw, centre, tokens)), origin);
    } else {
      mine = op.compose(at, raw, tokens);
    }
    // Ordered by the barrier: a warp reads the maps that were stored before it. With two buffers in turn, whoever overwrites one is past
    // the barrier of the tile between, which every reader of that buffer reaches only after its reads.
    shared[buffer].b[rank][lane] = mine.b;
    if constexpr (!Op::kConstantFactor) shared[buffer].a[rank][lane] = mine.a;
    __syncthreads();
    const auto map_of = [&](int i) { return with_factor({shared[buffer].a[i][lane], shared[buffer].b[i][lane]}); };
#pragma unroll
    for (int i = 0; i < ScanGeometry::kColumnWarps - 1; ++i) {
      if (i >= rank) break;
      x = map_of(i)(x);
    }
    const T enter = x;
    if (tile + warps * N < layout.seq_len) {
      for (int i = rank; i < warps; ++i) x = map_of(i)(x);
    }
    buffer ^= 1;
    op.emit(at, tokens, kIsCentred<Op> ? enter - origin : enter);
    if (exists && step < layout.seq_len && step + N >= layout.seq_len) op.finish(seq, with_factor(mine)(enter));
  }
}

// --- host ------------------------------------------------------------------------------------------------------------------------

// How one call is scanned; depends on the problem alone.
enum class ScanShape { kWarpRows, kBlockRows, kChunkedRows, kColumns };

struct ScanPlan {
  ScanShape shape;
  Access access;
  RowLayout rows;
};

// What the plan needs to know of the tensors of a call, collected one by one: add() returns the operand as the kernels want it.
class ScanTensors {
 public:
  // data and what follows: the tensor whose rows define where packs begin. accumulation: the dtype of T.
  ScanTensors(const Layout& layout, const void* data, DType dtype, int64_t seq_stride, int64_t time_stride, DType accumulation)
      : layout_(layout), accumulation_(accumulation), columns_(layout.cu_seqlens == nullptr && time_stride != 1 && seq_stride == 1),
        phase_(pack_phase(data, dtype, layout.cu_seqlens != nullptr ? time_stride : seq_stride)) {}

  ScanInput number(const Operand& x) { return input(x, accumulation_); }
  ScanInput flag(const Operand& x) { return input(x, DType::kInt8); }
  ScanOutput output(const Output& x) {
    const ScanInput in = input(Operand{x.data, x.dtype, x.seq_stride, x.time_stride}, accumulation_);
    return {x.data, in.row_bytes, in.time_bytes, in.vec};
  }

  // general: the operator's kernels are there for general access only.
  ScanPlan plan(bool general = false) const {
    using G = ScanGeometry;
    const int64_t seqs = layout_.num_seqs, tokens = layout_.seq_len;
    const bool packed = layout_.cu_seqlens != nullptr;
    ScanPlan plan{};
    plan.rows.layout = layout_;
    plan.rows.phase = phase_;
    plan.rows.packs = tokens / kVec;
    if (columns_) {
      plan.shape = ScanShape::kColumns;
      plan.access = plain_types_ && !general ? Access::kPlain : Access::kGeneral;
      return plan;
    }
    const bool whole_packs = !packed && tokens % kVec == 0 && phase_.phase == 0 && phase_.row_stride == 0;
    plan.access = Access::kGeneral;
    if (all_vec_ && whole_packs && !general) plan.access = plain_types_ && accumulation_ == DType::kFloat32 ? Access::kPlain : Access::kRegular;
    const int64_t row_tokens = packed ? (tokens + seqs - 1) / seqs : tokens;  // a segment's length is known on average only
    const int64_t tile_packs = int64_t{G::kRowWarps} * G::sub_tiles(plan.access) * kWarpSize;
    // A row that does not begin on a pack boundary may touch one pack more.
    const auto packs_of = [&](int64_t n) { return (n + (whole_packs ? 0 : kVec - 1) + kVec - 1) / kVec; };
    if (row_tokens <= G::kWarpRowTokens) {
      plan.shape = ScanShape::kWarpRows;
      int& log2 = plan.rows.width_log2;
      while (!packed && log2 > 0 && packs_of(tokens) <= int64_t{1} << (log2 - 1)) --log2;
    } else if (seqs <= (packed ? G::kSplitMaxPackedRows : G::kSplitMaxRows) && packs_of(row_tokens) >= G::kSplitMinTiles * tile_packs) {
      plan.shape = ScanShape::kChunkedRows;
      const int64_t tiles = (packs_of(tokens) + tile_packs - 1) / tile_packs;
      plan.rows.chunk_packs = (tiles + G::kSplitMaxChunks - 1) / G::kSplitMaxChunks * tile_packs;
      plan.rows.chunks = (packs_of(tokens) + plan.rows.chunk_packs - 1) / plan.rows.chunk_packs;
    } else {
      plan.shape = ScanShape::kBlockRows;
    }
    return plan;
  }

 private:
  ScanInput input(const Operand& x, DType plain_type) {
    const int64_t size = dtype_size(x.dtype), row_stride = layout_.cu_seqlens != nullptr ? x.time_stride : x.seq_stride;
    const bool vec = pack_aligned(x.data, x.dtype, x.time_stride, row_stride, phase_);
    if (x.data != nullptr) {
      plain_types_ = plain_types_ && x.dtype == plain_type;
      all_vec_ = all_vec_ && vec;
    }
    return {x.data, row_stride * size, x.time_stride * size, x.dtype, vec};
  }

  Layout layout_;
  DType accumulation_;
  bool columns_;
  PackPhase phase_;
  bool plain_types_ = true, all_vec_ = true;
};

// Scratch bytes of a plan; T: the carry's type.
template <typename T>
int64_t scan_workspace(const ScanPlan& plan) {
  return plan.shape == ScanShape::kChunkedRows ? plan.rows.layout.num_seqs * plan.rows.chunks * int64_t{sizeof(Affine<T>)} : 0;
}

// A block per group of sequences; more than the grid holds is an error of the launch, never a silent rest. (No memory holds so many: the
// narrowest block walks four sequences of a packed call, each with its entry in cu_seqlens.)
inline unsigned scan_grid(int64_t blocks) { return static_cast<unsigned>(std::min(blocks, ScanGeometry::kMaxGrid + 1)); }

template <typename Op, Access kAccess>
void launch_scan(const typename Op::Params& params, const ScanPlan& plan, void* workspace, cudaStream_t stream) {
  using G = ScanGeometry;
  using T = CarryOf<Op>;
  constexpr int K = G::sub_tiles(kAccess);
  const RowLayout& rows = plan.rows;
  const int64_t seqs = rows.layout.num_seqs, steps = rows.layout.seq_len;
  switch (plan.shape) {
    case ScanShape::kWarpRows: {
      const int64_t rows_per_block = G::kRowThreads >> rows.width_log2;
      const unsigned grid = scan_grid((seqs + rows_per_block - 1) / rows_per_block);
      if (K == 1 || (rows.layout.cu_seqlens == nullptr && steps <= G::kSubTileTokens)) {
        scan_rows_kernel<Op, kAccess, 1, 1><<<grid, G::kRowThreads, 0, stream>>>(params, rows);
      } else {
        scan_rows_kernel<Op, kAccess, 1, K><<<grid, G::kRowThreads, 0, stream>>>(params, rows);
      }
      break;
    }
    case ScanShape::kBlockRows:
      scan_rows_kernel<Op, kAccess, G::kRowWarps, K><<<scan_grid(seqs), G::kRowThreads, 0, stream>>>(params, rows);
      break;
    case ScanShape::kChunkedRows:
      {
        Affine<T>* maps = static_cast<Affine<T>*>(workspace);
        const unsigned grid = static_cast<unsigned>(seqs * rows.chunks);
        reduce_chunks_kernel<Op, kAccess, K><<<grid, G::kRowThreads, 0, stream>>>(params, rows, maps);
        scan_chunks_kernel<Op, kAccess, K><<<grid, G::kRowThreads, 0, stream>>>(params, rows, maps);
      }
      break;
    case ScanShape::kColumns:
      if constexpr (kAccess != Access::kRegular) {  // packs are no matter of columns
        constexpr int N = G::column_tokens(kAccess, Op::kConstantFactor, !std::is_same_v<T, typename Op::Scalar>);
        const unsigned warps = static_cast<unsigned>(std::min<int64_t>((steps + N - 1) / N, G::kColumnWarps));
        scan_columns_kernel<Op, kAccess, N>
            <<<scan_grid((seqs + kWarpSize - 1) / kWarpSize), dim3(kWarpSize, warps), 0, stream>>>(params, rows.layout);
      }
      break;
  }
}

}  // namespace fused_critic::cuda
