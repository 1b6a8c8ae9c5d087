// Eight-lane vectors of float or double on the compiler's vector extension (GCC, Clang).
// Included once per instruction set, inside FUSED_CRITIC_CPU_NAMESPACE. The number of lanes is the same everywhere and every
// operation is elementwise (the build forbids contraction to fused multiply-add), so all instruction sets give the same bits.
// No include guard on purpose: capability_*.cpp each define their namespace first.

namespace fused_critic::cpu::FUSED_CRITIC_CPU_NAMESPACE {

constexpr int kLanes = 8;

template <typename T> struct SameSizeInt;
template <> struct SameSizeInt<float> { using type = int32_t; };
template <> struct SameSizeInt<double> { using type = int64_t; };

// kLanes elements as kParts registers of FUSED_CRITIC_VECTOR_BYTES.
template <typename T>
struct Vec {
  static constexpr int kPartLanes = FUSED_CRITIC_VECTOR_BYTES / sizeof(T);
  static constexpr int kParts = kLanes / kPartLanes;
  static_assert(kParts >= 1 && kParts * kPartLanes == kLanes);
  typedef T Part __attribute__((vector_size(FUSED_CRITIC_VECTOR_BYTES)));
  Part part[kParts];

  FUSED_CRITIC_INLINE static Vec load(const T* p) {
    Vec v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  FUSED_CRITIC_INLINE static Vec all(T x) {
    Vec v;
    for (int i = 0; i < kParts; ++i) v.part[i] = x - Part{};
    return v;
  }
  FUSED_CRITIC_INLINE void store(T* p) const { std::memcpy(p, this, sizeof(*this)); }
};

template <typename T>
struct Mask {
  typedef typename SameSizeInt<T>::type Part __attribute__((vector_size(FUSED_CRITIC_VECTOR_BYTES)));
  Part part[Vec<T>::kParts];
};

#define FUSED_CRITIC_ARITHMETIC(op)                                                      \
  template <typename T>                                                                  \
  FUSED_CRITIC_INLINE Vec<T> operator op(const Vec<T>& a, const Vec<T>& b) {                          \
    Vec<T> c;                                                                            \
    for (int i = 0; i < Vec<T>::kParts; ++i) c.part[i] = a.part[i] op b.part[i];         \
    return c;                                                                            \
  }
FUSED_CRITIC_ARITHMETIC(+)
FUSED_CRITIC_ARITHMETIC(-)
FUSED_CRITIC_ARITHMETIC(*)
#undef FUSED_CRITIC_ARITHMETIC

#define FUSED_CRITIC_COMPARISON(op)                                                      \
  template <typename T>                                                                  \
  FUSED_CRITIC_INLINE Mask<T> operator op(const Vec<T>& a, const Vec<T>& b) {                         \
    Mask<T> c;                                                                           \
    for (int i = 0; i < Vec<T>::kParts; ++i) c.part[i] = a.part[i] op b.part[i];         \
    return c;                                                                            \
  }
FUSED_CRITIC_COMPARISON(<)
FUSED_CRITIC_COMPARISON(>)
FUSED_CRITIC_COMPARISON(!=)
#undef FUSED_CRITIC_COMPARISON

template <typename T>
FUSED_CRITIC_INLINE Vec<T> select(const Mask<T>& m, const Vec<T>& a, const Vec<T>& b) {
  Vec<T> c;
  for (int i = 0; i < Vec<T>::kParts; ++i) c.part[i] = m.part[i] ? a.part[i] : b.part[i];
  return c;
}

template <typename T>
FUSED_CRITIC_INLINE Mask<T> operator&(const Mask<T>& a, const Mask<T>& b) {
  Mask<T> c;
  for (int i = 0; i < Vec<T>::kParts; ++i) c.part[i] = a.part[i] & b.part[i];
  return c;
}

// Masks as counters, lane by lane: a set lane is the integer -1.
template <typename T>
FUSED_CRITIC_INLINE Mask<T> operator+(const Mask<T>& a, const Mask<T>& b) {
  Mask<T> c;
  for (int i = 0; i < Vec<T>::kParts; ++i) c.part[i] = a.part[i] + b.part[i];
  return c;
}

// Vec<T>::kPartLanes bytes, widened without sign: one instruction on x86, which GCC does not find by itself for vectors of eight bytes and less.
template <typename T>
FUSED_CRITIC_INLINE typename Mask<T>::Part widen(const int8_t* p) {
#if defined(__x86_64__) && FUSED_CRITIC_VECTOR_BYTES == 32 && !defined(__clang__)
  typedef char Register __attribute__((vector_size(16)));
  typedef long long Words __attribute__((vector_size(16)));
  if constexpr (sizeof(T) == 4) {
    long long word;
    std::memcpy(&word, p, sizeof(word));
    return (typename Mask<T>::Part)__builtin_ia32_pmovzxbd256((Register)(Words{word, 0}));
  } else {
    int word;
    std::memcpy(&word, p, sizeof(word));
    return (typename Mask<T>::Part)__builtin_ia32_pmovzxbq256((Register)(Words{word, 0}));
  }
#else
  typedef uint8_t Bytes __attribute__((vector_size(Vec<T>::kPartLanes)));
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(bytes, typename Mask<T>::Part);
#endif
}

// Which of kLanes bytes are not zero.
template <typename T>
FUSED_CRITIC_INLINE Mask<T> nonzero(const int8_t* p) {
  Mask<T> m;
  for (int i = 0; i < Vec<T>::kParts; ++i) m.part[i] = widen<T>(p + i * Vec<T>::kPartLanes) > 0;
  return m;
}

template <typename T>
FUSED_CRITIC_INLINE double count(const Mask<T>& counters) {
  typename SameSizeInt<T>::type sum = 0;
  for (int i = 0; i < Vec<T>::kParts; ++i) {
    for (int lane = 0; lane < Vec<T>::kPartLanes; ++lane) sum -= counters.part[i][lane];
  }
  return double(sum);
}

// a > b ? a : b and a < b ? a : b, so b where they are unordered: one instruction on x86, which the compiler does not find by itself.
#if defined(__x86_64__) && FUSED_CRITIC_VECTOR_BYTES == 32
FUSED_CRITIC_INLINE Vec<float>::Part larger(Vec<float>::Part a, Vec<float>::Part b) { return __builtin_ia32_maxps256(a, b); }
FUSED_CRITIC_INLINE Vec<float>::Part smaller(Vec<float>::Part a, Vec<float>::Part b) { return __builtin_ia32_minps256(a, b); }
FUSED_CRITIC_INLINE Vec<double>::Part larger(Vec<double>::Part a, Vec<double>::Part b) { return __builtin_ia32_maxpd256(a, b); }
FUSED_CRITIC_INLINE Vec<double>::Part smaller(Vec<double>::Part a, Vec<double>::Part b) { return __builtin_ia32_minpd256(a, b); }
#elif defined(__x86_64__)
FUSED_CRITIC_INLINE Vec<float>::Part larger(Vec<float>::Part a, Vec<float>::Part b) { return __builtin_ia32_maxps(a, b); }
FUSED_CRITIC_INLINE Vec<float>::Part smaller(Vec<float>::Part a, Vec<float>::Part b) { return __builtin_ia32_minps(a, b); }
FUSED_CRITIC_INLINE Vec<double>::Part larger(Vec<double>::Part a, Vec<double>::Part b) { return __builtin_ia32_maxpd(a, b); }
FUSED_CRITIC_INLINE Vec<double>::Part smaller(Vec<double>::Part a, Vec<double>::Part b) { return __builtin_ia32_minpd(a, b); }
#else
template <typename Part> FUSED_CRITIC_INLINE Part larger(Part a, Part b) { return a > b ? a : b; }
template <typename Part> FUSED_CRITIC_INLINE Part smaller(Part a, Part b) { return a < b ? a : b; }
#endif

template <typename T>
FUSED_CRITIC_INLINE Vec<T> max(const Vec<T>& a, const Vec<T>& b) {
  Vec<T> c;
  for (int i = 0; i < Vec<T>::kParts; ++i) c.part[i] = larger(a.part[i], b.part[i]);
  return c;
}

template <typename T>
FUSED_CRITIC_INLINE Vec<T> min(const Vec<T>& a, const Vec<T>& b) {
  Vec<T> c;
  for (int i = 0; i < Vec<T>::kParts; ++i) c.part[i] = smaller(a.part[i], b.part[i]);
  return c;
}

// Lanes move down by kBy: lane i gets lane i + kBy of v, or of `fill` where that is beyond the last lane.
template <int kBy, typename T>
FUSED_CRITIC_INLINE Vec<T> shift_down(const Vec<T>& v, const Vec<T>& fill) {
  constexpr int kPartLanes = Vec<T>::kPartLanes, kParts = Vec<T>::kParts;
  constexpr int kWhole = kBy / kPartLanes, kRest = kBy % kPartLanes;
  Vec<T> out;
  for (int i = 0; i < kParts; ++i) {
    const int from = i + kWhole;
    const auto lower = from < kParts ? v.part[from] : fill.part[from - kParts];
    if constexpr (kRest == 0) {
      out.part[i] = lower;
    } else {
      const auto upper = from + 1 < kParts ? v.part[from + 1] : fill.part[from + 1 - kParts];
      typename Mask<T>::Part index;
      for (int lane = 0; lane < kPartLanes; ++lane) index[lane] = lane + kRest;
#ifdef __clang__
      typename Vec<T>::Part moved;  // a constant shuffle after unrolling
      for (int lane = 0; lane < kPartLanes; ++lane) moved[lane] = lane + kRest < kPartLanes ? lower[lane + kRest] : upper[lane + kRest - kPartLanes];
      out.part[i] = moved;
#else
      out.part[i] = __builtin_shuffle(lower, upper, index);
#endif
    }
  }
  return out;
}

template <typename T>
FUSED_CRITIC_INLINE T first_lane(const Vec<T>& v) {
  return v.part[0][0];
}

template <typename T>
FUSED_CRITIC_INLINE T lowest(const Vec<T>& v) {
  T x[kLanes];
  v.store(x);
  return std::min(std::min(std::min(x[0], x[1]), std::min(x[2], x[3])), std::min(std::min(x[4], x[5]), std::min(x[6], x[7])));
}

template <typename T>
FUSED_CRITIC_INLINE T highest(const Vec<T>& v) {
  T x[kLanes];
  v.store(x);
  return std::max(std::max(std::max(x[0], x[1]), std::max(x[2], x[3])), std::max(std::max(x[4], x[5]), std::max(x[6], x[7])));
}

// Sum in a fixed order, in double.
template <typename T>
FUSED_CRITIC_INLINE double sum(const Vec<T>& v) {
  typedef T Half __attribute__((vector_size(kLanes / 2 * sizeof(T))));
  typedef double Wide __attribute__((vector_size(kLanes / 2 * sizeof(double))));
  Half half[2];
  std::memcpy(half, &v, sizeof(half));
  const Wide x = __builtin_convertvector(half[0], Wide) + __builtin_convertvector(half[1], Wide);
  return (x[0] + x[1]) + (x[2] + x[3]);
}

}  // namespace fused_critic::cpu::FUSED_CRITIC_CPU_NAMESPACE
