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
  typedef T Unaligned __attribute__((vector_size(FUSED_CRITIC_VECTOR_BYTES), aligned(alignof(T)), may_alias));
  Part part[kParts];

  FUSED_CRITIC_INLINE static Vec load(const T* p) {
    Vec v;
    for (int i = 0; i < kParts; ++i) v.part[i] = reinterpret_cast<const Unaligned*>(p)[i];
    return v;
  }
  FUSED_CRITIC_INLINE static Vec all(T x) {
    Vec v;
    for (int i = 0; i < kParts; ++i) v.part[i] = x - Part{};
    return v;
  }
  FUSED_CRITIC_INLINE void store(T* p) const {
    for (int i = 0; i < kParts; ++i) reinterpret_cast<Unaligned*>(p)[i] = part[i];
  }
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

// Lane i is lane from(i) of v, or lane from(i) - kLanes of w. from: known at compile time, the lanes of a part coming from at most two parts.
template <typename T, typename From>
FUSED_CRITIC_INLINE Vec<T> lanes_from(const Vec<T>& v, const Vec<T>& w, From from) {
  constexpr int kPartLanes = Vec<T>::kPartLanes, kParts = Vec<T>::kParts;
  Vec<T> out;
  for (int i = 0; i < kParts; ++i) {
    const int first = from(i * kPartLanes) / kPartLanes;
    int second = first;
    typename Mask<T>::Part index;
    for (int lane = 0; lane < kPartLanes; ++lane) {
      const int part = from(i * kPartLanes + lane) / kPartLanes, within = from(i * kPartLanes + lane) % kPartLanes;
      if (part != first) second = part;
      index[lane] = part != first ? within + kPartLanes : within;
    }
    const auto a = first < kParts ? v.part[first] : w.part[first - kParts], b = second < kParts ? v.part[second] : w.part[second - kParts];
#ifdef __clang__  // a constant shuffle after unrolling
    for (int lane = 0; lane < kPartLanes; ++lane) out.part[i][lane] = index[lane] < kPartLanes ? a[index[lane]] : b[index[lane] - kPartLanes];
#else
    out.part[i] = __builtin_shuffle(a, b, index);
#endif
  }
  return out;
}

// Lanes move down by kBy: lane i gets lane i + kBy of v, or of `fill` where that is beyond the last lane.
template <int kBy, typename T>
FUSED_CRITIC_INLINE Vec<T> shift_down(const Vec<T>& v, const Vec<T>& fill) {
  return lanes_from(v, fill, [](int lane) { return lane + kBy; });
}

// The same within each half of the lanes, zeros entering.
template <int kBy, typename T>
FUSED_CRITIC_INLINE Vec<T> shift_down_in_halves(const Vec<T>& v) {
  constexpr int kHalf = kLanes / 2;
  return lanes_from(v, Vec<T>::all(T(0)), [](int lane) { return lane % kHalf + kBy < kHalf ? lane + kBy : lane + kLanes; });
}

// The first lane of the upper half throughout the lower half, and zeros above.
template <typename T>
FUSED_CRITIC_INLINE Vec<T> upper_to_lower(const Vec<T>& v) {
  constexpr int kHalf = kLanes / 2;
  return lanes_from(v, Vec<T>::all(T(0)), [](int lane) { return lane < kHalf ? kHalf : lane + kLanes; });
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

// Lanes 0 4 1 5 2 6 3 7, and back.
template <typename T>
FUSED_CRITIC_INLINE Vec<T> interleave_halves(const Vec<T>& v) {
  return lanes_from(v, v, [](int lane) { return lane / 2 + lane % 2 * (kLanes / 2); });
}
template <typename T>
FUSED_CRITIC_INLINE Vec<T> separate_halves(const Vec<T>& v) {
  return lanes_from(v, v, [](int lane) { return lane % (kLanes / 2) * 2 + lane / (kLanes / 2); });
}

// Transposes the 4 x 4 lanes of the lower halves, and those of the upper halves. Its own inverse.
template <typename T>
FUSED_CRITIC_INLINE void transpose_in_halves(Vec<T> (&rows)[4]) {
  // Within each half, of v and w: v0 w0 v1 w1 and v2 w2 v3 w3; v0 v1 w0 w1 and v2 v3 w2 w3.
  const auto low_each = [](int lane) { return lane / 4 * 4 + lane % 4 / 2 + lane % 2 * kLanes; };
  const auto high_each = [](int lane) { return lane / 4 * 4 + 2 + lane % 4 / 2 + lane % 2 * kLanes; };
  const auto low_pairs = [](int lane) { return lane / 4 * 4 + lane % 2 + lane % 4 / 2 * kLanes; };
  const auto high_pairs = [](int lane) { return lane / 4 * 4 + 2 + lane % 2 + lane % 4 / 2 * kLanes; };
  const Vec<T> a = lanes_from(rows[0], rows[1], low_each), b = lanes_from(rows[0], rows[1], high_each);
  const Vec<T> c = lanes_from(rows[2], rows[3], low_each), d = lanes_from(rows[2], rows[3], high_each);
  rows[0] = lanes_from(a, c, low_pairs);
  rows[1] = lanes_from(a, c, high_pairs);
  rows[2] = lanes_from(b, d, low_pairs);
  rows[3] = lanes_from(b, d, high_pairs);
}

// Transposes 8 x 8 lanes. Its own inverse.
template <typename T>
FUSED_CRITIC_INLINE void transpose(Vec<T> (&rows)[kLanes]) {
  constexpr int kHalf = kLanes / 2;
  const auto lower = [](int lane) { return lane % kHalf + lane / kHalf * kLanes; };
  const auto upper = [](int lane) { return lane % kHalf + lane / kHalf * kLanes + kHalf; };
  Vec<T> first[kHalf], second[kHalf];
  for (int i = 0; i < kHalf; ++i) {
    first[i] = lanes_from(rows[i], rows[i + kHalf], lower);
    second[i] = lanes_from(rows[i], rows[i + kHalf], upper);
  }
  transpose_in_halves(first);
  transpose_in_halves(second);
  for (int i = 0; i < kHalf; ++i) rows[i] = first[i], rows[i + kHalf] = second[i];
}

// Bit i is set where byte i is not zero: of 16 bytes as two words (in registers: put together in memory, the processor would wait for the
// stores), of 32, and of n <= 32.
FUSED_CRITIC_INLINE uint32_t bits_of(uint64_t lower, uint64_t upper) {
#if defined(__x86_64__)
  typedef unsigned long long Words __attribute__((vector_size(16)));
  typedef char Bytes __attribute__((vector_size(16)));
  return ~uint32_t(__builtin_ia32_pmovmskb128(Bytes(Bytes(Words{lower, upper}) == Bytes{}))) & 0xFFFFu;
#else
  const auto gather = [](uint64_t x) {
    const uint64_t low = 0x7F7F7F7F7F7F7F7Full, set = (((x & low) + low) | x) & ~low;  // the top bit of each byte that is not zero
    return uint32_t((set >> 7) * 0x0102040810204080ull >> 56);                           // gathers eight bits that lie eight apart
  };
  return gather(lower) | gather(upper) << 8;
#endif
}
FUSED_CRITIC_INLINE uint32_t bits_of(const uint8_t* bytes) {
  uint64_t x[4];
  std::memcpy(x, bytes, sizeof(x));
  return bits_of(x[0], x[1]) | bits_of(x[2], x[3]) << 16;
}
inline uint32_t bits_of(const uint8_t* bytes, int64_t n) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < n; ++i) bits |= uint32_t(bytes[i] != 0) << i;
  return bits;
}

// What there is to know of a set of lanes, which is a number of kLanes bits.
struct LaneMoves {
  int8_t lanes[kLanes];      // -1 for those in the set
  uint8_t together[kLanes];  // moves them, in order, to the lower end; the lanes above get one that is not in the set
  uint8_t after[kLanes];     // from there, gives each of them what lies one lane above it (not for the set of all lanes)
  int32_t count;
};

struct LaneMovesTable {
  LaneMoves of[1 << kLanes];
};

constexpr LaneMovesTable lane_moves() {
  LaneMovesTable table{};
  for (int bits = 0; bits < 1 << kLanes; ++bits) {
    LaneMoves& moves = table.of[bits];
    int outside = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      if ((bits >> lane & 1) == 0) {
        outside = lane;
        continue;
      }
      moves.lanes[lane] = -1;
      moves.together[moves.count++] = uint8_t(lane);
      moves.after[lane] = uint8_t(moves.count % kLanes);
    }
    for (int to = moves.count; to < kLanes; ++to) moves.together[to] = uint8_t(outside);
  }
  return table;
}

constexpr LaneMovesTable kLaneMoves = lane_moves();

// Lane i becomes lane index[i].
template <typename T>
FUSED_CRITIC_INLINE Vec<T> permute(const Vec<T>& v, const uint8_t (&index)[kLanes]) {
  T from[kLanes], to[kLanes];
  v.store(from);
  for (int i = 0; i < kLanes; ++i) to[i] = from[index[i]];
  return Vec<T>::load(to);
}

// A set of lanes.
template <typename T>
FUSED_CRITIC_INLINE Mask<T> lanes_of(uint32_t set) {
  Mask<T> m;
  for (int i = 0; i < Vec<T>::kParts; ++i) {
    typename Mask<T>::Part bit;
    for (int lane = 0; lane < Vec<T>::kPartLanes; ++lane) bit[lane] = 1 << (i * Vec<T>::kPartLanes + lane);
    m.part[i] = (bit & typename SameSizeInt<T>::type(set)) == bit;
  }
  return m;
}

#if defined(__x86_64__) && FUSED_CRITIC_VECTOR_BYTES == 32
// Eight bytes as lanes. What GCC makes of __builtin_convertvector is far from the one instruction.
template <typename Byte>
FUSED_CRITIC_INLINE Mask<float>::Part widen(const Byte (&bytes)[kLanes]) {
#ifdef __clang__
  typedef Byte Bytes __attribute__((vector_size(kLanes)));
  Bytes x;
  std::memcpy(&x, bytes, kLanes);
  return __builtin_convertvector(x, Mask<float>::Part);
#else
  typedef long long Words __attribute__((vector_size(16)));
  typedef char Bytes __attribute__((vector_size(16)));
  long long word;
  std::memcpy(&word, bytes, kLanes);
  const Bytes x = Bytes(Words{word, 0});
  if constexpr (Byte(-1) < 0) return __builtin_ia32_pmovsxbd256(x);
  return __builtin_ia32_pmovzxbd256(x);
#endif
}
template <>
FUSED_CRITIC_INLINE Vec<float> permute(const Vec<float>& v, const uint8_t (&index)[kLanes]) {
  return {{__builtin_ia32_permvarsf256(v.part[0], widen(index))}};
}
template <>
FUSED_CRITIC_INLINE Mask<float> lanes_of(uint32_t set) {
  return {{widen(kLaneMoves.of[set].lanes)}};
}
#endif

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
