// Four tokens side by side: typed, vectorised, predicated access to operands.
//
// A pack is kVec consecutive elements along one axis (element i at offset + i * step). `live` says by one bit per element which of
// them exist: only those are touched. A full pack of an operand that host code found to be aligned (pack_aligned) moves by one
// 16-byte access (8- and 4-byte for narrower types, two of 16 for 8-byte types); every other pack by predicated scalar accesses.
// Rows of any length stay vectorised: a row is walked from a virtual start, lowered by lead = phase mod kVec elements to a pack boundary,
// and the tokens before its begin and after its end are not live.
#pragma once

#include <cuda_runtime.h>

#include "operand.cuh"

namespace fused_critic::cuda {

static_assert(kVec == 4, "the access code below is written for packs of four");

constexpr unsigned kAllLive = (1u << kVec) - 1;

template <typename T>
struct Pack {
  T v[kVec];
};

// The live bits of elements first, first + 1, ... of a row whose elements are [0, length).
template <typename I>
__device__ __forceinline__ unsigned live_elements(I first, I length) {
  unsigned live = 0;
#pragma unroll
  for (int i = 0; i < kVec; ++i) live |= (first + i >= 0 && first + i < length) ? 1u << i : 0u;
  return live;
}

// --- host: may packs of this tensor be accessed as vectors? ------------------------------------------------------------------

// Where a row's packs begin: row r starts (phase + r * row_stride) mod kVec elements after a pack boundary.
struct PackPhase {
  int64_t phase = 0;
  int64_t row_stride = 0;
  __host__ __device__ int lead(int64_t row) const { return static_cast<int>((phase + row * row_stride) & (kVec - 1)); }
};

// The phase of a tensor's own rows. pack_stride: its stride along the pack axis; row_stride: the stride between rows, or, for packed
// sequences, 1 with the first token of the segment in place of the row index.
inline PackPhase pack_phase(const void* data, DType dtype, int64_t row_stride) {
  return {static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) / dtype_size(dtype)) & (kVec - 1), row_stride & (kVec - 1)};
}

// True if every pack of the tensor that starts on a pack boundary of `reference` is aligned in memory too.
inline bool pack_aligned(const void* data, DType dtype, int64_t pack_stride, int64_t row_stride, const PackPhase& reference) {
  if (data == nullptr) return true;
  const PackPhase own = pack_phase(data, dtype, row_stride);
  return pack_stride == 1 && reinterpret_cast<uintptr_t>(data) % dtype_size(dtype) == 0 &&
         ((own.phase - reference.phase) & (kVec - 1)) == 0 && ((own.row_stride - reference.row_stride) & (kVec - 1)) == 0;
}

// --- device: loads -----------------------------------------------------------------------------------------------------------

// Four elements as they lie in memory, in the low words. Apart from the type conversion, so that a thread can issue all loads of
// several packs before it waits for the first. 8-byte elements are narrowed at once where T is float.
template <typename T>
struct RawPack {
  uint32_t word[kVec * sizeof(T) / sizeof(uint32_t)];
};

template <typename T>
__device__ __forceinline__ RawPack<T> fetch_vector(const Operand& x, int64_t offset) {
  RawPack<T> raw = {};
  const int size = dtype_size(x.dtype);
  const void* at = static_cast<const char*>(x.data) + offset * size;
  switch (size) {
    case 4: {
      const uint4 u = __ldg(static_cast<const uint4*>(at));
      raw.word[0] = u.x, raw.word[1] = u.y, raw.word[2] = u.z, raw.word[3] = u.w;
      break;
    }
    case 2: {
      const uint2 u = __ldg(static_cast<const uint2*>(at));
      raw.word[0] = u.x, raw.word[1] = u.y;
      break;
    }
    case 1: raw.word[0] = __ldg(static_cast<const unsigned*>(at)); break;
    case 8: {
      const uint4 a = __ldg(static_cast<const uint4*>(at)), b = __ldg(static_cast<const uint4*>(at) + 1);
      const uint32_t u[2 * kVec] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
      if constexpr (sizeof(T) == 8) {
        for (int i = 0; i < 2 * kVec; ++i) raw.word[i] = u[i];
      } else {
        for (int i = 0; i < kVec; ++i) {
          raw.word[i] = x.dtype == DType::kInt64 ? u[2 * i] | u[2 * i + 1]
                                                 : __float_as_uint(static_cast<float>(__hiloint2double(u[2 * i + 1], u[2 * i])));
        }
      }
      break;
    }
  }
  return raw;
}

// The visible tail: scalar, predicated, any step. Elements that are not live read as zero bits.
template <typename T>
__device__ __forceinline__ RawPack<T> fetch_scalar(const Operand& x, int64_t offset, int64_t step, unsigned live) {
  RawPack<T> raw = {};
  switch (dtype_size(x.dtype)) {
    case 4:
#pragma unroll
      for (int i = 0; i < kVec; ++i)
        if (live >> i & 1) raw.word[i] = __ldg(static_cast<const uint32_t*>(x.data) + offset + i * step);
      break;
    case 2:
#pragma unroll
      for (int i = 0; i < kVec; ++i)
        if (live >> i & 1) raw.word[i / 2] |= uint32_t{__ldg(static_cast<const uint16_t*>(x.data) + offset + i * step)} << (i % 2 * 16);
      break;
    case 1:
#pragma unroll
      for (int i = 0; i < kVec; ++i)
        if (live >> i & 1) raw.word[0] |= uint32_t{__ldg(static_cast<const uint8_t*>(x.data) + offset + i * step)} << (i * 8);
      break;
    case 8:
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        if (!(live >> i & 1)) continue;
        const uint2 u = __ldg(static_cast<const uint2*>(x.data) + offset + i * step);
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

// vec: pack_aligned for this operand (the same for every thread of a launch).
template <typename T>
__device__ __forceinline__ RawPack<T> fetch(const Operand& x, int64_t offset, int64_t step, unsigned live, bool vec) {
  return vec && live == kAllLive ? fetch_vector<T>(x, offset) : fetch_scalar<T>(x, offset, step, live);
}

// One aligned pack of a known type.
__device__ __forceinline__ Pack<float> load_vector(const float* at) {
  const float4 u = __ldg(reinterpret_cast<const float4*>(at));
  return {{u.x, u.y, u.z, u.w}};
}
__device__ __forceinline__ Pack<double> load_vector(const double* at) {
  const double2 a = __ldg(reinterpret_cast<const double2*>(at)), b = __ldg(reinterpret_cast<const double2*>(at) + 1);
  return {{a.x, a.y, b.x, b.y}};
}

// What a mask that was not given reads as, of type kInt8: one at every live element.
template <typename T>
__device__ __forceinline__ RawPack<T> ones_mask(unsigned live) {
  RawPack<T> raw = {};
  raw.word[0] = (live & 1) | (live & 2) << 7 | (live & 4) << 14 | (live & 8) << 21;
  return raw;
}

// Elements in T; integers and bool as 0 or 1 (zero or not), as in load().
template <typename T>
__device__ __forceinline__ Pack<T> unpack(const RawPack<T>& raw, DType dtype) {
  Pack<T> out;
  switch (dtype) {
    case DType::kFloat64:
      if constexpr (sizeof(T) == 8) {
        for (int i = 0; i < kVec; ++i) out.v[i] = __hiloint2double(raw.word[2 * i + 1], raw.word[2 * i]);
        break;
      }
      [[fallthrough]];  // narrowed by the fetch
    case DType::kFloat32:
      for (int i = 0; i < kVec; ++i) out.v[i] = __uint_as_float(raw.word[i]);
      break;
    case DType::kBFloat16:
      for (int i = 0; i < kVec; ++i) out.v[i] = __uint_as_float(i % 2 ? raw.word[i / 2] & 0xffff0000u : raw.word[i / 2] << 16);
      break;
    case DType::kFloat16:
      for (int i = 0; i < kVec; ++i) out.v[i] = __half2float(__ushort_as_half(static_cast<uint16_t>(raw.word[i / 2] >> (i % 2 * 16))));
      break;
    case DType::kInt8:
      for (int i = 0; i < kVec; ++i) out.v[i] = (raw.word[0] & 0xffu << (i * 8)) != 0 ? T(1) : T(0);
      break;
    case DType::kInt16:
      for (int i = 0; i < kVec; ++i) out.v[i] = (raw.word[i / 2] & 0xffffu << (i % 2 * 16)) != 0 ? T(1) : T(0);
      break;
    case DType::kInt64:
      if constexpr (sizeof(T) == 8) {
        for (int i = 0; i < kVec; ++i) out.v[i] = (raw.word[2 * i] | raw.word[2 * i + 1]) != 0 ? T(1) : T(0);
        break;
      }
      [[fallthrough]];  // narrowed by the fetch
    case DType::kInt32:
      for (int i = 0; i < kVec; ++i) out.v[i] = raw.word[i] != 0 ? T(1) : T(0);
      break;
  }
  return out;
}

// One pack along time, fetched and converted; elements that are not live are 0.
template <typename T>
__device__ __forceinline__ Pack<T> load4(const Operand& x, int64_t offset, unsigned live, bool vec) {
  return unpack(fetch<T>(x, offset, x.time_stride, live, vec), x.dtype);
}

// Weights of one pack along time: an absent mask gives 1, an integer or bool mask 0 or 1, a floating mask its value; 0 where not live.
template <typename T>
__device__ __forceinline__ Pack<T> load4_mask(const Operand& mask, int64_t offset, unsigned live, bool vec) {
  if (mask.data == nullptr) return unpack(ones_mask<T>(live), DType::kInt8);
  return load4<T>(mask, offset, live, vec);
}

// --- device: stores ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint16_t bfloat16_bits(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ __forceinline__ uint16_t bfloat16_bits(double x) { return __bfloat16_as_ushort(__double2bfloat16(x)); }
__device__ __forceinline__ uint16_t float16_bits(float x) { return __half_as_ushort(__float2half_rn(x)); }
__device__ __forceinline__ uint16_t float16_bits(double x) { return __half_as_ushort(__double2half(x)); }

__device__ __forceinline__ uint2 join_halves(const uint16_t (&h)[kVec]) {
  return make_uint2(uint32_t{h[1]} << 16 | h[0], uint32_t{h[3]} << 16 | h[2]);
}

// Stores element i at offset + i * step in the output's (floating) dtype with one rounding.
template <typename T>
__device__ __forceinline__ void store4(const Output& x, int64_t offset, int64_t step, const Pack<T>& p, unsigned live, bool vec) {
  vec = vec && live == kAllLive;
  if (x.dtype == DType::kFloat32) {
    float* at = static_cast<float*>(x.data) + offset;
    if (vec) {
      // The explicit store intrinsics keep the vector: a plain assignment has been seen to be split into scalar stores.
      __stcg(reinterpret_cast<float4*>(at), make_float4(p.v[0], p.v[1], p.v[2], p.v[3]));
      return;
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      if (live >> i & 1) at[i * step] = static_cast<float>(p.v[i]);
  } else if (sizeof(T) == sizeof(double) && x.dtype == DType::kFloat64) {  // arithmetic in float has no such output
    double* at = static_cast<double*>(x.data) + offset;
    if (vec) {
      __stcg(reinterpret_cast<double2*>(at), make_double2(p.v[0], p.v[1]));
      __stcg(reinterpret_cast<double2*>(at) + 1, make_double2(p.v[2], p.v[3]));
      return;
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      if (live >> i & 1) at[i * step] = static_cast<double>(p.v[i]);
  } else {
    uint16_t* at = static_cast<uint16_t*>(x.data) + offset;
    uint16_t h[kVec];
    for (int i = 0; i < kVec; ++i) h[i] = x.dtype == DType::kBFloat16 ? bfloat16_bits(p.v[i]) : float16_bits(p.v[i]);
    if (vec) {
      __stcg(reinterpret_cast<uint2*>(at), join_halves(h));
      return;
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      if (live >> i & 1) at[i * step] = h[i];
  }
}

// One pack along time.
template <typename T>
__device__ __forceinline__ void store4(const Output& x, int64_t offset, const Pack<T>& p, unsigned live, bool vec) {
  store4(x, offset, x.time_stride, p, live, vec);
}

}  // namespace fused_critic::cuda
