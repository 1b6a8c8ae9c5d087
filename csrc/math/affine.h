// A step of a first-order linear recurrence is the map x -> a x + b. Maps compose associatively, which is what makes the scan parallel.
#pragma once

#include <cmath>

#include "platform.h"

namespace fused_critic {

template <typename T>
struct alignas(2 * sizeof(T)) Affine {
  T a = T(1), b = T(0);  // the identity
  FUSED_CRITIC_HD T operator()(T x) const { return a * x + b; }
};

// The map of x that does to x - origin what m does: x - origin leaves as m(x - origin).
template <typename T>
FUSED_CRITIC_HD Affine<T> counted_from_zero(const Affine<T>& m, T origin) {
  using std::fma;
  return {m.a, fma(-m.a, origin, m.b + origin)};
}

// (second after first)(x) = second(first(x))
template <typename T>
FUSED_CRITIC_HD Affine<T> compose(const Affine<T>& second, const Affine<T>& first) {
  return {second.a * first.a, second.a * first.b + second.b};
}

}  // namespace fused_critic
