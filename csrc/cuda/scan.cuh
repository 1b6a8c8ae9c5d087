// First-order linear recurrences over sequences, parallel in time: every token is an affine map x -> a x + b of one carried scalar x
// (math/affine.h), and a scan of the maps gives the x that enters each token. The kernels know nothing of what the maps mean; an operator
// is a
//
//   struct Op {
//     using Scalar;                              // accumulation type T
//     struct Params;                             // POD: every kernel's argument
//     static constexpr bool kReverse;            // true: scanned from the last token of a sequence to its first
//     static constexpr bool kConstantFactor;     // true: every token has a == factor(), and none is skipped
//     explicit Op(const Params&);
//     template <typename At> struct Raw;         // what fetch() loads for the At::kTokens tokens of one thread: At::Numbers and At::Flags
//     struct Token;                              // one decoded token
//     Raw<At> fetch(const At&) const;            // loads only, so that all of a tile are in flight before the first is used
//     void decode(const At&, const Raw<At>&, Token (&)[At::kTokens]) const;
//     Affine<T> map(const Token&) const;         // the identity for a token that is skipped or outside of the sequence
//     void emit(const At&, const Token (&)[N], const T (&entering)[N]) const;  // At writes live tokens only
//     T factor() const;                          // kConstantFactor only
//     T initial(int64_t seq) const;              // the x that enters the sequence
//     void finish(int64_t seq, T leaving) const; // called once per sequence with the x that leaves it
//   };
//
// All arrays of tokens are in memory order. Deterministic: every combination has a fixed order that depends on the problem alone.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../math/affine.h"
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
  // At most 96 registers a thread: a tile's tokens fit without spills, and 20 warps per SM hide the loads. General access keeps many
  // addresses as well: at most 128, and whatever it takes for double.
  static constexpr int row_min_blocks(size_t scalar, Access access) {
    return access != Access::kGeneral ? 5 : (scalar == sizeof(float) ? 4 : 2);
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
  static constexpr int kSplitMaxChunks = 256;      // per row: bounds what a block reads of its predecessors to eight maps a lane

  // Columns (time-major): a thread per sequence and chunk of time.
  static constexpr int kColumnWarps = 8;
  static constexpr int kColumnThreads = kColumnWarps * kWarpSize;
  // At most 128 registers a thread of float: a chunk's tokens stay in registers between the two walks.
  static constexpr int column_min_blocks(size_t scalar) { return scalar == sizeof(float) ? 2 : 1; }
  // Steps of time per thread, all of whose loads are in flight together; fewer where the access code is large. A power of two.
  static constexpr int column_tokens(Access access) { return access == Access::kPlain ? 16 : 8; }

  static constexpr int64_t kMaxGrid = (int64_t{1} << 31) - 1;
};
static_assert(ScanGeometry::kWarpRowTokens >= ScanGeometry::kSubTileTokens, "rows of up to one sub-tile belong to the warp kernels");
static_assert(ScanGeometry::kSplitMaxRows * ScanGeometry::kSplitMaxChunks <= ScanGeometry::kMaxGrid, "a block per chunk must fit the grid");
static_assert(ScanGeometry::kRowThreads * ScanGeometry::row_min_blocks(sizeof(float), Access::kPlain) <= 1024 &&
                  ScanGeometry::kColumnThreads * ScanGeometry::column_min_blocks(sizeof(float)) <= 1024,
              "sm_75 holds 1024 threads per SM");

// --- operands ------------------------------------------------------------------------------------------------------------------

// An operand or output as the kernels see it. vec: pack_aligned() to the reference phase of the launch.
// Packed sequences: seq_stride is the time stride, and a segment's first token takes the place of the sequence's index.
struct ScanInput {
  Operand x;
  bool vec = false;
  __device__ explicit operator bool() const { return x.data != nullptr; }
};

struct ScanOutput {
  Output x;
  bool vec = false;
  __device__ explicit operator bool() const { return x.data != nullptr; }
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
__device__ __forceinline__ RawPack<T> fetch_strided(const Operand& x, int64_t offset, int64_t step, unsigned live) {
  RawPack<T> raw = {};
  const int size = dtype_size(x.dtype);
  const char* at = static_cast<const char*>(x.data) + offset * size;
  step *= size;
  switch (size) {
    case 4:
#pragma unroll
      for (int i = 0; i < kVec; ++i, at += step)
        if (live >> i & 1) raw.word[i] = __ldg(reinterpret_cast<const uint32_t*>(at));
      break;
    case 2:
#pragma unroll
      for (int i = 0; i < kVec; ++i, at += step)
        if (live >> i & 1) raw.word[i / 2] |= uint32_t{__ldg(reinterpret_cast<const uint16_t*>(at))} << (i % 2 * 16);
      break;
    case 1:
#pragma unroll
      for (int i = 0; i < kVec; ++i, at += step)
        if (live >> i & 1) raw.word[0] |= uint32_t{__ldg(reinterpret_cast<const uint8_t*>(at))} << (i * 8);
      break;
    case 8:
#pragma unroll
      for (int i = 0; i < kVec; ++i, at += step) {
        if (!(live >> i & 1)) continue;
        const uint2 u = __ldg(reinterpret_cast<const uint2*>(at));
        if constexpr (sizeof(T) == 8) {
          raw.word[2 * i] = u.x, raw.word[2 * i + 1] = u.y;
        } else {
          raw.word[i] = x.dtype == DType::kInt64 ? u.x | u.y : __float_as_uint(static_cast<float>(__hiloint2double(u.y, u.x)));
        }
      }
      break;
  }
  return raw;
}

constexpr uint32_t kAllSet = 0x01010101u;  // as flag_bytes

// The tokens of one lane in a row: kVec of them along time, from `first` on; bit i of `live`: token first + i belongs to the row.
// Where packs are regular, lanes that are not live load the row's first pack instead of branching; what they hold is of no account, but
// their flags are 0. At run time the usual types come first, the others by a switch.
template <typename T, Access kAccess>
struct RowTokens {
  static constexpr bool kPlain = kAccess == Access::kPlain, kRegular = kAccess != Access::kGeneral;
  static_assert(!kPlain || sizeof(T) == sizeof(float), "plain rows hold floats");
  static constexpr int kTokens = kVec;
  using Numbers = RawPack<T>;
  using Flags = uint32_t;  // flag_bytes
  int64_t origin, first;
  unsigned live;

  __device__ __forceinline__ int64_t load_first() const { return live != 0 ? first : 0; }
  __device__ __forceinline__ bool vectorised(bool vec) const { return kRegular || (vec && live == kAllLive); }

  // Row first, then token, in bytes: the row's part is the same for every tile, the token's for every operand of a size.
  template <typename S>
  __device__ __forceinline__ const S* aligned(const ScanInput& in) const {
    const S* row = static_cast<const S*>(in.x.data) + origin * in.x.seq_stride;
    const int64_t token = kRegular ? load_first() : first * in.x.time_stride;
    return reinterpret_cast<const S*>(reinterpret_cast<const char*>(row) + token * int64_t{sizeof(S)});
  }

  __device__ __forceinline__ Numbers fetch(const ScanInput& in) const {
    if (kPlain || (vectorised(in.vec) && in.x.dtype == DType::kFloat32)) {
      const float4 u = __ldg(reinterpret_cast<const float4*>(aligned<float>(in)));
      Numbers raw = {};
      raw.word[0] = __float_as_uint(u.x), raw.word[1] = __float_as_uint(u.y);
      raw.word[2] = __float_as_uint(u.z), raw.word[3] = __float_as_uint(u.w);
      return raw;
    }
    return fetch_other(in);
  }

  __device__ __forceinline__ Numbers fetch_other(const ScanInput& in) const {
    const int64_t at = origin * in.x.seq_stride + (kRegular ? load_first() : first * in.x.time_stride);
    return vectorised(in.vec) ? cuda::fetch<T>(in.x, at, 1, kAllLive, true) : fetch_strided<T>(in.x, at, in.x.time_stride, live);
  }

  __device__ __forceinline__ Flags fetch_present(const ScanInput& in) const {
    if (kPlain || (vectorised(in.vec) && in.x.dtype == DType::kInt8)) return __ldg(reinterpret_cast<const uint32_t*>(aligned<uint8_t>(in)));
    return flag_bytes<T>(fetch_other(in), in.x.dtype);
  }

  // Zero where the operand is absent.
  __device__ __forceinline__ Numbers fetch_optional(const ScanInput& in) const { return in ? fetch(in) : Numbers{}; }
  __device__ __forceinline__ Flags fetch_flags(const ScanInput& in) const { return in ? fetch_present(in) : 0u; }

  // Inside the row and not masked; an absent mask masks nothing.
  __device__ __forceinline__ Flags fetch_valid(const ScanInput& mask) const {
    if constexpr (kRegular) {
      const Flags set = mask ? fetch_present(mask) : kAllSet;
      return live != 0 ? set : 0u;
    } else {
      return mask ? fetch_present(mask) : ones_mask<T>(live).word[0];
    }
  }

  __device__ __forceinline__ void numbers(const ScanInput& in, const Numbers& raw, T (&out)[kTokens]) const {
    Pack<T> p;
    if (kPlain || (sizeof(T) == sizeof(float) && in.x.dtype == DType::kFloat32)) {
      p = unpack<T>(raw, DType::kFloat32);
    } else {
      p = unpack<T>(raw, in.x.dtype);
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) out[i] = p.v[i];
  }

  __device__ __forceinline__ static bool test(Flags flags, int i) { return (flags & 0xffu << (8 * i)) != 0; }

  // Outputs of a scan are of type T.
  __device__ __forceinline__ void write(const ScanOutput& out, const T (&v)[kTokens]) const {
    const int64_t step = kRegular ? 1 : out.x.time_stride;
    T* at = static_cast<T*>(out.x.data) + origin * out.x.seq_stride + first * step;
    if (vectorised(out.vec)) {
      // The explicit store intrinsics keep the vector: a plain assignment has been seen to be split into scalar stores.
      if constexpr (sizeof(T) == sizeof(float)) {
        __stcg(reinterpret_cast<float4*>(at), make_float4(v[0], v[1], v[2], v[3]));
      } else {
        __stcg(reinterpret_cast<double2*>(at), make_double2(v[0], v[1]));
        __stcg(reinterpret_cast<double2*>(at) + 1, make_double2(v[2], v[3]));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kTokens; ++i)
        if (live >> i & 1) at[i * step] = v[i];
    }
  }
};

// The tokens of one thread in a column: N of them from time `first` on, of which [0, length) exist. Neighbouring lanes hold neighbouring
// sequences.
template <typename T, Access kAccess, int N>
struct ColumnTokens {
  static constexpr bool kPlain = kAccess == Access::kPlain;
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
    const S* at = static_cast<const S*>(in.x.data) + origin * in.x.seq_stride + first * in.x.time_stride;
    if (full()) {
#pragma unroll
      for (int i = 0; i < N; ++i, at += in.x.time_stride) raw.v[i] = convert(__ldg(at));
    } else {
      raw = {};
#pragma unroll
      for (int i = 0; i < N; ++i, at += in.x.time_stride)
        if (live(i)) raw.v[i] = convert(__ldg(at));
    }
    return raw;
  }

  __device__ __forceinline__ Numbers fetch(const ScanInput& in) const {
    const auto number = [](auto v) { return static_cast<T>(v); };
    const auto flag = [](auto v) { return v != 0 ? T(1) : T(0); };
    if constexpr (kPlain) return fetch_as<T, Numbers>(in, number);
    switch (in.x.dtype) {
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
    T* at = static_cast<T*>(out.x.data) + origin * out.x.seq_stride + first * out.x.time_stride;
    if (full()) {
#pragma unroll
      for (int i = 0; i < N; ++i, at += out.x.time_stride) __stcs(at, v[i]);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i, at += out.x.time_stride)
        if (live(i)) __stcs(at, v[i]);
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

// One sequence: `packs` packs from the virtual start -lead on; pack j in scan order is the j-th from the end where the scan is reversed.
// `last`: the pack whose lane finishes the sequence (pack 0 of an empty one), -1 for none.
struct Row {
  int64_t seq, origin, length, packs, last;
  int lead;
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

// The maps of one thread's tokens, composed in scan order.
template <typename Op, int N>
__device__ __forceinline__ Affine<typename Op::Scalar> compose_tokens(const Op& op, const typename Op::Token (&tokens)[N]) {
  Affine<typename Op::Scalar> m = op.map(tokens[in_scan_order<Op::kReverse, N>(0)]);
#pragma unroll
  for (int i = 1; i < N; ++i) m = compose(op.map(tokens[in_scan_order<Op::kReverse, N>(i)]), m);
  return m;
}

// Walks the tokens with the x that enters the first of them, emits, and returns the x that leaves the last.
template <typename Op, typename At>
__device__ __forceinline__ typename Op::Scalar walk(const Op& op, const At& at, const typename Op::Token (&tokens)[At::kTokens],
                                                    typename Op::Scalar x) {
  typename Op::Scalar entering[At::kTokens];
#pragma unroll
  for (int i = 0; i < At::kTokens; ++i) {
    const int t = in_scan_order<Op::kReverse, At::kTokens>(i);
    entering[t] = x;
    x = op.map(tokens[t])(x);
  }
  op.emit(at, tokens, entering);
  return x;
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
__device__ __forceinline__ T from_last(T v, LaneGroup g) {
  return __shfl_sync(kFullWarp, v, g.width - 1, g.width);
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
  // Of an inclusive scan: the maps before this lane; the map of all lanes, in the last lane; and in every lane.
  __device__ __forceinline__ Affine<T> before(const Affine<T>& m) const {
    return {from_below(m.a, T(1), group), from_below(m.b, T(0), group)};
  }
  __device__ __forceinline__ Affine<T> whole(const Affine<T>& m) const { return m; }
  __device__ __forceinline__ Affine<T> total(const Affine<T>& m) const { return {from_last(m.a, group), from_last(m.b, group)}; }
};

// ... or, where every token has the same factor, with that factor's powers: no products travel through the shuffles, and the a of the
// scanned maps are not kept up.
template <typename T>
struct PowerScan {
  static constexpr int kLevels = 5;  // log2(kWarpSize)
  LaneGroup group;
  T level[kLevels + 1];              // level[d]: factor^tokens of 2^d packs; the last: of a sub-tile
  T lanes_before;                    // of the packs of the lanes before this one

  __device__ __forceinline__ PowerScan(T factor, LaneGroup g) : group(g) {
    const T squared = factor * factor;
    level[0] = squared * squared;
    lanes_before = (g.lane & 1) ? level[0] : T(1);
#pragma unroll
    for (int d = 1; d <= kLevels; ++d) {
      level[d] = level[d - 1] * level[d - 1];
      if (d < kLevels && (g.lane >> d & 1)) lanes_before *= level[d];
    }
  }

  template <int K, int kLevel = 0>
  __device__ __forceinline__ void scan(Affine<T> (&m)[K]) const {
    if constexpr (kLevel < kLevels) {
#pragma unroll
      for (int k = 0; k < K; ++k) scan_step<(1 << kLevel)>(m[k].b, level[kLevel], group);
      scan<K, kLevel + 1>(m);
    }
  }
  __device__ __forceinline__ T factor(const Affine<T>&) const { return level[0]; }
  __device__ __forceinline__ Affine<T> before(const Affine<T>& m) const { return {lanes_before, from_below(m.b, T(0), group)}; }
  __device__ __forceinline__ Affine<T> whole(const Affine<T>& m) const { return {level[kLevels], m.b}; }
  __device__ __forceinline__ Affine<T> total(const Affine<T>& m) const { return {level[kLevels], from_last(m.b, group)}; }
};

// Double-buffered, so that one barrier a tile is enough: nobody is two tiles ahead.
template <typename T, int kWarps>
struct RowShared {
  alignas(16) T a[2][kWarps], b[2][kWarps];
};

// One warp's share of a tile: K sub-tiles of its row from pack `first` on.
template <typename Op, Access kAccess, int K>
struct WarpTile {
  using T = typename Op::Scalar;
  using At = RowTokens<T, kAccess>;
  At at[K];
  typename Op::Token tokens[K][kVec];
  Affine<T> scanned[K];

  // Tokens, and the map of each lane's in `scanned`.
  __device__ __forceinline__ void load(const Op& op, const Row& row, int64_t first, int64_t end, int lane) {
    typename Op::template Raw<At> raw[K];
    const int64_t pack = first + lane;
    const int64_t token = (Op::kReverse ? row.packs - 1 - pack : pack) * kVec - row.lead;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      at[k].origin = row.origin;
      at[k].first = token + (Op::kReverse ? -k : k) * kWarpSize * kVec;
      const bool inside = pack + k * kWarpSize < end;
      at[k].live = !inside ? 0u : (At::kRegular ? kAllLive : live_elements(at[k].first, row.length));
      raw[k] = op.fetch(at[k]);
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      op.decode(at[k], raw[k], tokens[k]);
      scanned[k] = compose_tokens(op, tokens[k]);
    }
  }

  // The map of all K sub-tiles, in the last lane.
  template <typename Scan>
  __device__ __forceinline__ Affine<T> whole(const Scan& scan) const {
    Affine<T> m = scan.whole(scanned[0]);
#pragma unroll
    for (int k = 1; k < K; ++k) m = compose(scan.whole(scanned[k]), m);
    return m;
  }
};

template <typename Op>
using ScanOf = std::conditional_t<Op::kConstantFactor, PowerScan<typename Op::Scalar>, AffineScan<typename Op::Scalar>>;

template <typename Op>
__device__ __forceinline__ ScanOf<Op> scan_of(const Op& op, LaneGroup group) {
  if constexpr (Op::kConstantFactor) {
    return {op.factor(), group};
  } else {
    return {typename Op::Scalar(1), group};
  }
}

// Scans the packs [begin, end) of a row by kWarps warps, entered by x. At least one tile is walked, so an empty sequence is finished too.
template <typename Op, Access kAccess, int kWarps, int K>
__device__ __forceinline__ void scan_row(const Op& op, const ScanOf<Op>& scan, const Row& row, int64_t begin, int64_t end,
                                         typename Op::Scalar x, RowShared<typename Op::Scalar, kWarps>* shared) {
  using T = typename Op::Scalar;
  // A warp alone with one sub-tile knows x before it scans: the first lane's map takes it in, and the scan gives values instead of maps.
  constexpr bool kEarly = kWarps == 1 && K == 1;
  // Plain rows come here with one sub-tile only where it holds the whole row.
  constexpr bool kOneTile = kEarly && kAccess == Access::kPlain;
  const int rank = kWarps == 1 ? 0 : threadIdx.x / kWarpSize;
  int buffer = 0;
  int64_t tile = begin;
  do {
    const int64_t first = tile + rank * K * kWarpSize;
    WarpTile<Op, kAccess, K> w;
    w.load(op, row, first, end, scan.group.lane);
    tile += kWarps * K * kWarpSize;

    T enter[K];  // of each sub-tile's first lane, then of this lane
    enter[0] = x;
    if constexpr (kEarly) {
      const T leaving = scan.factor(w.scanned[0]) * x + w.scanned[0].b;
      if (scan.group.lane == 0) w.scanned[0].b = leaving;
    }
    scan.scan(w.scanned);
    if constexpr (kWarps > 1) {
      const Affine<T> mine = w.whole(scan);
      if (scan.group.lane == kWarpSize - 1) {
        if constexpr (!Op::kConstantFactor) shared->a[buffer][rank] = mine.a;
        shared->b[buffer][rank] = mine.b;
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        x = Affine<T>{Op::kConstantFactor ? mine.a : shared->a[buffer][i], shared->b[buffer][i]}(x);
        if (i < rank) enter[0] = x;
      }
      buffer ^= 1;
    }
    if constexpr (kEarly) {
      enter[0] = from_below(w.scanned[0].b, x, scan.group);
      if (!kOneTile && tile < end) x = from_last(w.scanned[0].b, scan.group);
    } else {
#pragma unroll
      for (int k = 1; k < K; ++k) enter[k] = scan.total(w.scanned[k - 1])(enter[k - 1]);
      if (kWarps == 1 && tile < end) x = scan.total(w.scanned[K - 1])(enter[K - 1]);
#pragma unroll
      for (int k = 0; k < K; ++k) enter[k] = scan.before(w.scanned[k])(enter[k]);
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (w.at[k].live != 0) enter[k] = walk(op, w.at[k], w.tokens[k], enter[k]);
      if (first + k * kWarpSize + scan.group.lane == row.last) op.finish(row.seq, enter[k]);
    }
  } while (!kOneTile && tile < end);
}

// kWarps 1: a warp walks a row, or several rows of up to 2^width_log2 packs share it; kRowWarps: a block walks a row.
template <typename Op, Access kAccess, int kWarps, int K>
__global__ void __launch_bounds__(ScanGeometry::kRowThreads, ScanGeometry::row_min_blocks(sizeof(typename Op::Scalar), kAccess))
scan_rows_kernel(const typename Op::Params params, const RowLayout rows) {
  using T = typename Op::Scalar;
  const Op op(params);
  __shared__ RowShared<T, kWarps> shared;
  const int width_log2 = kWarps == 1 ? rows.width_log2 : kWarpSizeLog2, width = 1 << width_log2;
  const auto scan = scan_of(op, LaneGroup{static_cast<int>(threadIdx.x & (width - 1)), width});
  const int row_in_block = kWarps == 1 ? threadIdx.x >> width_log2 : 0;
  const int rows_per_block = kWarps == 1 ? ScanGeometry::kRowThreads >> width_log2 : 1;
  const int64_t num_rows = rows.layout.num_seqs, seq = int64_t{blockIdx.x} * rows_per_block + row_in_block;
  // Lanes without a row stay for the shuffles.
  const bool exists = kWarps > 1 || seq < num_rows;
  Row row = row_at<kAccess>(rows, exists ? seq : num_rows - 1);
  if (!exists) row.last = -1;
  scan_row<Op, kAccess, kWarps, K>(op, scan, row, 0, exists ? row.packs : 0, op.initial(row.seq), &shared);
}

// --- few long rows: chunks over blocks ---------------------------------------------------------------------------------------

// First launch: the map of every chunk that another follows, to maps[seq * chunks + chunk].
template <typename Op, Access kAccess, int K>
__global__ void __launch_bounds__(ScanGeometry::kRowThreads, ScanGeometry::row_min_blocks(sizeof(typename Op::Scalar), kAccess))
reduce_chunks_kernel(const typename Op::Params params, const RowLayout rows,
                     Affine<typename Op::Scalar>* __restrict__ maps) {
  using T = typename Op::Scalar;
  static_assert(!Op::kConstantFactor, "chunk maps carry their products");
  constexpr int kWarps = ScanGeometry::kRowWarps;
  __shared__ RowShared<T, kWarps> shared;
  const int chunks = static_cast<int>(rows.chunks), chunk = blockIdx.x % chunks;
  const Row row = row_at<kAccess>(rows, blockIdx.x / chunks);
  const int64_t begin = chunk * rows.chunk_packs, end = begin + rows.chunk_packs;
  if (end >= row.packs) return;  // the last chunk has no successor

  const Op op(params);
  const int rank = threadIdx.x / kWarpSize;
  const auto scan = scan_of(op, LaneGroup{static_cast<int>(threadIdx.x % kWarpSize), kWarpSize});
  int buffer = 0;
  Affine<T> acc;
  for (int64_t tile = begin; tile < end; tile += kWarps * K * kWarpSize) {
    WarpTile<Op, kAccess, K> w;
    w.load(op, row, tile + rank * K * kWarpSize, end, scan.group.lane);
    scan.scan(w.scanned);
    const Affine<T> mine = w.whole(scan);
    if (scan.group.lane == kWarpSize - 1) {
      shared.a[buffer][rank] = mine.a;
      shared.b[buffer][rank] = mine.b;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kWarps; ++i) acc = compose(Affine<T>{shared.a[buffer][i], shared.b[buffer][i]}, acc);
    buffer ^= 1;
  }
  if (threadIdx.x == 0) maps[blockIdx.x] = acc;
}

// Second launch: every block composes the maps before its chunk, in order, and scans the chunk.
template <typename Op, Access kAccess, int K>
__global__ void __launch_bounds__(ScanGeometry::kRowThreads, ScanGeometry::row_min_blocks(sizeof(typename Op::Scalar), kAccess))
scan_chunks_kernel(const typename Op::Params params, const RowLayout rows,
                   const Affine<typename Op::Scalar>* __restrict__ maps) {
  using T = typename Op::Scalar;
  constexpr int kWarps = ScanGeometry::kRowWarps;
  __shared__ RowShared<T, kWarps> shared;
  const int chunks = static_cast<int>(rows.chunks), chunk = blockIdx.x % chunks;
  const Row row = row_at<kAccess>(rows, blockIdx.x / chunks);
  const int64_t begin = chunk * rows.chunk_packs;
  if (chunk > 0 && begin >= row.packs) return;

  const Op op(params);
  const int lane = threadIdx.x % kWarpSize, run = (chunk + kWarpSize - 1) / kWarpSize;
  const auto scan = scan_of(op, LaneGroup{lane, kWarpSize});
  // Every lane composes a run of neighbouring maps, then the lanes are scanned.
  const Affine<T>* maps_before = maps + (blockIdx.x - chunk);
  Affine<T> before[1];
  for (int i = lane * run; i < min(chunk, (lane + 1) * run); ++i) before[0] = compose(maps_before[i], before[0]);
  scan.scan(before);
  const T x = scan.total(before[0])(op.initial(row.seq));

  scan_row<Op, kAccess, kWarps, K>(op, scan, row, begin, min(begin + rows.chunk_packs, row.packs), x, &shared);
}

// --- columns -------------------------------------------------------------------------------------------------------------------

// The x that leaves the last live token.
template <typename Op, typename At>
__device__ __forceinline__ typename Op::Scalar leaving(const Op& op, const At& at, const typename Op::Token (&tokens)[At::kTokens],
                                                       typename Op::Scalar x) {
#pragma unroll
  for (int i = 0; i < At::kTokens; ++i) {
    const int t = in_scan_order<Op::kReverse, At::kTokens>(i);
    if (at.live(t)) x = op.map(tokens[t])(x);
  }
  return x;
}

// A thread holds N steps of one sequence; the warps of a block take neighbouring chunks of time of the same 32 sequences.
template <typename Op, Access kAccess, int N>
__global__ void __launch_bounds__(ScanGeometry::kColumnThreads, ScanGeometry::column_min_blocks(sizeof(typename Op::Scalar)))
scan_columns_kernel(const typename Op::Params params, const Layout layout) {
  using T = typename Op::Scalar;
  using At = ColumnTokens<T, kAccess, N>;
  const Op op(params);
  __shared__ struct {
    T a[ScanGeometry::kColumnWarps][kWarpSize], b[ScanGeometry::kColumnWarps][kWarpSize];
  } shared[2];
  T chunk_factor = T(1);
  if constexpr (Op::kConstantFactor) {
    static_assert((N & (N - 1)) == 0, "by repeated squaring");
    chunk_factor = op.factor();
#pragma unroll
    for (int n = 1; n < N; n *= 2) chunk_factor *= chunk_factor;
  }
  const int lane = threadIdx.x, rank = threadIdx.y, warps = blockDim.y;
  int buffer = 0;
  const int64_t seq = int64_t{blockIdx.x} * kWarpSize + lane;
  const bool exists = seq < layout.num_seqs;
  T x = exists ? op.initial(seq) : T(0);
  for (int64_t tile = 0; tile < layout.seq_len; tile += warps * N) {
    const int64_t step = tile + rank * N;
    const At at{seq, Op::kReverse ? layout.seq_len - N - step : step, exists ? layout.seq_len : 0};
    typename Op::Token tokens[N];
    op.decode(at, op.fetch(at), tokens);
    const Affine<T> mine = compose_tokens(op, tokens);
    shared[buffer].b[rank][lane] = mine.b;
    if constexpr (!Op::kConstantFactor) shared[buffer].a[rank][lane] = mine.a;
    __syncthreads();
    const auto map_of = [&](int i) {
      return Affine<T>{Op::kConstantFactor ? chunk_factor : shared[buffer].a[i][lane], shared[buffer].b[i][lane]};
    };
    for (int i = 0; i < rank; ++i) x = map_of(i)(x);
    const T enter = x;
    if (tile + warps * N < layout.seq_len) {
      for (int i = rank; i < warps; ++i) x = map_of(i)(x);
    }
    buffer ^= 1;
    walk(op, at, tokens, enter);
    if (exists && step < layout.seq_len && step + N >= layout.seq_len) op.finish(seq, leaving(op, at, tokens, enter));
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

  ScanInput number(const Operand& x) { return add<ScanInput>(x, accumulation_); }
  ScanInput flag(const Operand& x) { return add<ScanInput>(x, DType::kInt8); }
  ScanOutput output(const Output& x) { return add<ScanOutput>(x, accumulation_); }

  ScanPlan plan() const {
    using G = ScanGeometry;
    const int64_t seqs = layout_.num_seqs, tokens = layout_.seq_len;
    const bool packed = layout_.cu_seqlens != nullptr;
    ScanPlan plan{};
    plan.rows.layout = layout_;
    plan.rows.phase = phase_;
    plan.rows.packs = tokens / kVec;
    if (columns_) {
      plan.shape = ScanShape::kColumns;
      plan.access = plain_types_ ? Access::kPlain : Access::kGeneral;
      return plan;
    }
    const bool whole_packs = !packed && tokens % kVec == 0 && phase_.phase == 0 && phase_.row_stride == 0;
    plan.access = Access::kGeneral;
    if (all_vec_ && whole_packs) plan.access = plain_types_ && accumulation_ == DType::kFloat32 ? Access::kPlain : Access::kRegular;
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
  template <typename In, typename X>
  In add(X x, DType plain_type) {
    if (layout_.cu_seqlens != nullptr) x.seq_stride = x.time_stride;
    const bool vec = pack_aligned(x.data, x.dtype, x.time_stride, x.seq_stride, phase_);
    if (x.data != nullptr) {
      plain_types_ = plain_types_ && x.dtype == plain_type;
      all_vec_ = all_vec_ && vec;
    }
    return {x, vec};
  }

  Layout layout_;
  DType accumulation_;
  bool columns_;
  PackPhase phase_;
  bool plain_types_ = true, all_vec_ = true;
};

// Scratch bytes of a plan.
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
  using T = typename Op::Scalar;
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
      if constexpr (!Op::kConstantFactor) {
        Affine<T>* maps = static_cast<Affine<T>*>(workspace);
        const unsigned grid = static_cast<unsigned>(seqs * rows.chunks);
        reduce_chunks_kernel<Op, kAccess, K><<<grid, G::kRowThreads, 0, stream>>>(params, rows, maps);
        scan_chunks_kernel<Op, kAccess, K><<<grid, G::kRowThreads, 0, stream>>>(params, rows, maps);
      }
      break;
    case ScanShape::kColumns:
      if constexpr (kAccess != Access::kRegular) {  // packs are no matter of columns
        constexpr int N = G::column_tokens(kAccess);
        const unsigned warps = static_cast<unsigned>(std::min<int64_t>((steps + N - 1) / N, G::kColumnWarps));
        scan_columns_kernel<Op, kAccess, N>
            <<<scan_grid((seqs + kWarpSize - 1) / kWarpSize), dim3(kWarpSize, warps), 0, stream>>>(params, rows.layout);
      }
      break;
  }
}

}  // namespace fused_critic::cuda
