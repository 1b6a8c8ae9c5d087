// What the vectorised kernels offer, a table of each type per instruction set; the drivers (value_loss.cpp, gae.cpp) pick one at run time.
// A driver deals in chunks (units of work, fixed by the shape alone), a kernel in tiles of at most kTile tokens.
#pragma once

#include <cmath>
#include <cstdint>

#include "../gae.h"
#include "../math/affine.h"
#include "../math/platform.h"
#include "../math/vtrace.h"
#include "../reverse_scan.h"
#include "../value_loss.h"
#include "../vtrace.h"

namespace fused_critic::cpu {

// Tokens in a tile: what a kernel usually needs of float tiles (inputs in place, a mask, outputs) stays in the first-level cache, and a lane
// sums at most kTile / 8 terms in the accumulation type before the sum moves to double.
constexpr int64_t kTile = 1024;

// Tokens in a chunk: large enough to hide the start of a parallel region, small enough to balance.
constexpr int64_t kChunk = 16384;

// Rectangle of tokens in terms of operand strides: lines run over one of (sequence, time), positions within a line over the other.
struct TileSpec {
  int64_t lines, length;       // lines * length <= kTile
  int64_t first_seq, first_t;  // of its first token; operands without sequence stride (packed): first_seq = 0 and first_t counts from the start
  bool time_major;             // lines run over time, positions over sequences
};

template <typename T>
struct LossKernels {
  // Adds the tile's moments (all but kSequences). token_loss, if not null, receives w l per token and token_weight the weights.
  void (*forward)(const ValueLossParams& p, const TileSpec& tile, T low, T high, double* moments, T* token_loss, T* token_weight);
  // seq_factor: one factor per token of the tile, or null. scale: of the whole call.
  void (*backward)(const ValueLossBackwardParams& p, const TileSpec& tile, T low, T high, double scale, const T* seq_factor);
  void (*store_tokens)(const T* tokens, const Output& y, const TileSpec& tile);
};

constexpr int kPowers = 8;   // tokens that a vector composes
constexpr int kSegment = 4;  // tokens that one lane may stand for

// What a call needs of gamma and lambda, computed once, each number rounded once.
template <typename T>
struct GaePowers {
  T gamma, drift, rest;                                  // drift: 1 - gamma; rest: gamma (1 - lam)
  T token[2 * kPowers] = {}, segment[2 * kPowers] = {};  // x^8, x^7, ..., 1, 0, ... of x = gamma lam, and of x = (gamma lam)^4

  GaePowers(double gamma, double lam) : gamma(T(gamma)), drift(T(1 - gamma)), rest(T(gamma * (1 - lam))) {
    const double x = gamma * lam;
    fill(token, x);
    fill(segment, x * x * (x * x));
  }

 private:
  static_assert(kSegment == 4);
  static void fill(T* down, double x) {
    double power = 1;
    for (int i = kPowers; i >= 0; --i, power *= x) down[i] = T(power);
  }
};

// A sequence for a kernel that takes several: its operands start at element seq * seq_stride + origin * time_stride.
struct LaneSequence {
  int64_t seq, origin, length;
};

enum class ScanMode { kEmit, kEmitAndAggregate, kAggregate };

template <typename T>
struct GaeKernels {
  // Tokens [begin, end) of one sequence (operands start at element `seq`), from the last to the first. Takes the carry that enters and returns
  // the one that leaves. Aggregating modes also leave the composed map of the range in *total; kAggregate writes nothing else.
  T (*rows)(const GaeParams& p, int64_t seq, int64_t seq_origin, int64_t begin, int64_t end, const GaePowers<T>& powers, T carry, ScanMode mode, Affine<T>* total);
  // One element of an operand.
  T (*element)(const Operand& x, int64_t index);
  // n sequences, eight at a time.
  void (*lockstep)(const GaeParams& p, const LaneSequence* sequences, int64_t n);
  // All time steps of the sequences [first, first + count), count <= kTile, in lock-step.
  void (*columns)(const GaeParams& p, int64_t first, int64_t count);
  // Adjoint of one sequence of `length` tokens, from the first to the last.
  void (*adjoint)(const GaeBackwardParams& p, int64_t seq, int64_t seq_origin, int64_t length);
};

// Sequences of `length` positions that are walked together: `count` of them from `first` on, side by side (across; count <= kTile), or one,
// whose first position is number `origin` of its operands.
struct SequenceWalk {
  int64_t first, count, origin, length;
  bool across;
};

template <typename T>
struct ScanKernels {
  void (*reverse_scan)(const ReverseScanParams& p, const SequenceWalk& walk);
  void (*reverse_scan_adjoint)(const ReverseScanBackwardParams& p, const SequenceWalk& walk);
  // n sequences, eight at a time.
  void (*reverse_scan_lockstep)(const ReverseScanParams& p, const LaneSequence* sequences, int64_t n);
  void (*reverse_scan_adjoint_lockstep)(const ReverseScanBackwardParams& p, const LaneSequence* sequences, int64_t n);
  void (*vtrace)(const VTraceParams& p, const SequenceWalk& walk);
};

template <typename T>
struct KernelTable {
  LossKernels<T> loss;
  GaeKernels<T> gae;
  ScanKernels<T> scan;
};

struct Kernels {
  const char* name;
  const KernelTable<float>* f32;
  const KernelTable<double>* f64;
};

extern const KernelTable<float> kDefaultFloats;
extern const KernelTable<double> kDefaultDoubles;
#if defined(__x86_64__)
extern const KernelTable<float> kAvx2Floats, kAvx512Floats;
extern const KernelTable<double> kAvx2Doubles;  // also where there is AVX-512: vectors are as wide, bits the same, and a third set a tenth of the build
#endif

// The table for this CPU: what torch itself chose (ATEN_CPU_CAPABILITY overrides both). Defined in capability.cpp.
const Kernels& kernels();

template <typename T> const LossKernels<T>& loss_kernels();
template <> inline const LossKernels<float>& loss_kernels<float>() { return kernels().f32->loss; }
template <> inline const LossKernels<double>& loss_kernels<double>() { return kernels().f64->loss; }
template <typename T> const GaeKernels<T>& gae_kernels();
template <> inline const GaeKernels<float>& gae_kernels<float>() { return kernels().f32->gae; }
template <> inline const GaeKernels<double>& gae_kernels<double>() { return kernels().f64->gae; }
template <typename T> const ScanKernels<T>& scan_kernels();
template <> inline const ScanKernels<float>& scan_kernels<float>() { return kernels().f32->scan; }
template <> inline const ScanKernels<double>& scan_kernels<double>() { return kernels().f64->scan; }

}  // namespace fused_critic::cpu
