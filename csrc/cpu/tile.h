// Tiles: a few hundred tokens of one operand as a plain array of the accumulation type. An operand that already is one is used in place;
// every other dtype or stride is converted into scratch that stays in the first-level cache. So kernels know T* alone, and a new
// storage type costs one line here. Included once per instruction set (see simd.h).

namespace fused_critic::cpu::FUSED_CRITIC_CPU_NAMESPACE {

// Elementwise conversions, written so that the compiler vectorises them for unit stride.
inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof(f));
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof(u));
  return u;
}

inline float bfloat16_to_float(uint16_t h) { return bits_to_float(uint32_t(h) << 16); }

// Round to nearest even; every NaN becomes the one of all ones.
inline uint16_t float_to_bfloat16(float f) {
  const uint32_t u = float_to_bits(f);
  return uint16_t(((u + 0x7FFFu + ((u >> 16) & 1u)) | -uint32_t(f != f)) >> 16);
}

// Exponent and mantissa move into float's fields; multiplying by 2^112 repairs the bias, for subnormals too. Inf and NaN get float's exponent.
inline float float16_to_float(uint16_t h) {
  const uint32_t magnitude = uint32_t(h & 0x7FFFu) << 13;
  const float finite = bits_to_float(magnitude) * 0x1.0p112f;
  const uint32_t bits = (h & 0x7FFFu) >= 0x7C00u ? (magnitude | 0x7F800000u) : float_to_bits(finite);
  return bits_to_float(bits | (uint32_t(h & 0x8000u) << 16));
}

// Round to nearest even by letting float addition round: adding 2^13 times the value's own exponent (but at least that of float16's
// smallest normal, so that subnormals round at their fixed place) pushes the surplus bits out.
inline uint16_t float_to_float16(float f) {
  const uint32_t u = float_to_bits(f);
  const uint32_t magnitude = u & 0x7FFFFFFFu;
  const uint32_t exponent = (magnitude & 0x7F800000u) > 0x38800000u ? (magnitude & 0x7F800000u) : 0x38800000u;
  const float anchor = bits_to_float(exponent + (13u << 23));
  const float kept = (bits_to_float(magnitude) + anchor) - anchor;
  const uint32_t scaled = float_to_bits(kept * 0x1.0p-112f) >> 13;
  const uint32_t finite = scaled > 0x7C00u ? 0x7C00u : scaled;
  const uint32_t half = magnitude > 0x7F800000u ? 0x7E00u : (magnitude >= 0x47800000u ? 0x7C00u : finite);
  return uint16_t(half | ((u >> 16) & 0x8000u));
}

template <typename T, typename From, typename Convert>
inline void convert_run(const From* __restrict from, int64_t stride, int64_t n, T* __restrict to, Convert convert) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = convert(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = convert(from[i * stride]);
  }
}

// n elements of a floating or integer operand from element `offset` on; integers become 0 or 1.
template <typename T>
inline void convert_run(const Operand& x, int64_t offset, int64_t stride, int64_t n, T* to) {
  const auto flag = [](auto v) { return v != 0 ? T(1) : T(0); };
  switch (x.dtype) {
    case DType::kFloat64: return convert_run(static_cast<const double*>(x.data) + offset, stride, n, to, [](double v) { return T(v); });
    case DType::kFloat32: return convert_run(static_cast<const float*>(x.data) + offset, stride, n, to, [](float v) { return T(v); });
    case DType::kBFloat16: return convert_run(static_cast<const uint16_t*>(x.data) + offset, stride, n, to, [](uint16_t v) { return T(bfloat16_to_float(v)); });
    case DType::kFloat16: return convert_run(static_cast<const uint16_t*>(x.data) + offset, stride, n, to, [](uint16_t v) { return T(float16_to_float(v)); });
    case DType::kInt8: return convert_run(static_cast<const int8_t*>(x.data) + offset, stride, n, to, flag);
    case DType::kInt16: return convert_run(static_cast<const int16_t*>(x.data) + offset, stride, n, to, flag);
    case DType::kInt32: return convert_run(static_cast<const int32_t*>(x.data) + offset, stride, n, to, flag);
    case DType::kInt64: return convert_run(static_cast<const int64_t*>(x.data) + offset, stride, n, to, flag);
  }
}

// Flags as bytes, non-zero where set: n elements from element `offset` on, in place or converted into scratch.
inline const uint8_t* load_flags(const Operand& x, int64_t offset, int64_t stride, int64_t n, uint8_t* scratch) {
  const auto convert = [&](const auto* data, auto is_set) {
    convert_run(data + offset, stride, n, scratch, [&](auto v) { return uint8_t(is_set(v)); });
  };
  const auto not_zero = [](auto v) { return v != 0; };
  const auto half_not_zero = [](uint16_t v) { return (v & 0x7FFFu) != 0; };
  switch (x.dtype) {
    case DType::kFloat64: convert(static_cast<const double*>(x.data), not_zero); break;
    case DType::kFloat32: convert(static_cast<const float*>(x.data), not_zero); break;
    case DType::kBFloat16:
    case DType::kFloat16: convert(static_cast<const uint16_t*>(x.data), half_not_zero); break;
    case DType::kInt8:
      if (stride == 1) return static_cast<const uint8_t*>(x.data) + offset;
      convert(static_cast<const uint8_t*>(x.data), not_zero);
      break;
    case DType::kInt16: convert(static_cast<const int16_t*>(x.data), not_zero); break;
    case DType::kInt32: convert(static_cast<const int32_t*>(x.data), not_zero); break;
    case DType::kInt64: convert(static_cast<const int64_t*>(x.data), not_zero); break;
  }
  return scratch;
}

template <typename T>
inline void store_run(const T* from, int64_t n, const Output& y, int64_t offset, int64_t stride) {
  const auto put = [&](auto* to, auto convert) {
    if (stride == 1) {
      for (int64_t i = 0; i < n; ++i) to[i] = convert(from[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i * stride] = convert(from[i]);
    }
  };
  switch (y.dtype) {
    case DType::kFloat64: return put(static_cast<double*>(y.data) + offset, [](T v) { return double(v); });
    case DType::kFloat32: return put(static_cast<float*>(y.data) + offset, [](T v) { return float(v); });
    case DType::kBFloat16: return put(static_cast<uint16_t*>(y.data) + offset, [](T v) { return float_to_bfloat16(float(v)); });
    case DType::kFloat16: return put(static_cast<uint16_t*>(y.data) + offset, [](T v) { return float_to_float16(float(v)); });
    default: return;  // outputs are floating
  }
}

template <typename T> constexpr DType dtype_of();
template <> constexpr DType dtype_of<float>() { return DType::kFloat32; }
template <> constexpr DType dtype_of<double>() { return DType::kFloat64; }
template <> constexpr DType dtype_of<int8_t>() { return DType::kInt8; }  // flags

// A rectangle of tokens: `lines` runs of `length` tokens. Element (line, i) of an operand lies at origin + line * line_stride + i * stride.
struct Rect {
  int64_t lines, length;
  int64_t size() const { return lines * length; }
};

inline bool is_one_run(int64_t line_stride, int64_t stride, Rect rect) { return rect.lines == 1 || line_stride == stride * rect.length; }

// Where a kernel may read a rectangle itself, or write it if it is of an output; nullptr if it is no plain array of T.
template <typename T, typename X>
inline auto direct_rect(const X& x, int64_t origin, int64_t line_stride, int64_t stride, Rect rect) {
  using Pointer = std::conditional_t<std::is_same_v<X, Output>, T*, const T*>;
  return is_one_run(line_stride, stride, rect) && stride == 1 && x.dtype == dtype_of<T>() ? static_cast<Pointer>(x.data) + origin : nullptr;
}

template <typename T>
inline const T* load_rect(const Operand& x, int64_t origin, int64_t line_stride, int64_t stride, Rect rect, T* scratch) {
  if (const T* direct = direct_rect<T>(x, origin, line_stride, stride, rect); direct != nullptr || x.data == nullptr) return direct;
  if (is_one_run(line_stride, stride, rect)) {
    convert_run(x, origin, stride, rect.size(), scratch);
  } else {
    for (int64_t l = 0; l < rect.lines; ++l) convert_run(x, origin + l * line_stride, stride, rect.length, scratch + l * rect.length);
  }
  return scratch;
}

template <typename T>
inline void store_rect(const T* from, const Output& y, int64_t origin, int64_t line_stride, int64_t stride, Rect rect) {
  for (int64_t l = 0; l < rect.lines; ++l) store_run(from + l * rect.length, rect.length, y, origin + l * line_stride, stride);
}

}  // namespace fused_critic::cpu::FUSED_CRITIC_CPU_NAMESPACE
