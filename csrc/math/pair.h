// Two numbers with elementwise arithmetic: what two recurrences over the same steps carry side by side.
#pragma once

#include <cmath>
#include <type_traits>

#include "platform.h"

namespace fused_critic {

template <typename T>
struct Pair {
  T first, second;
  Pair() = default;
  FUSED_CRITIC_HD explicit Pair(T both) : first(both), second(both) {}
  FUSED_CRITIC_HD Pair(T first, T second) : first(first), second(second) {}
};

template <typename T>
FUSED_CRITIC_HD Pair<T> operator+(Pair<T> x, Pair<T> y) {
  return {x.first + y.first, x.second + y.second};
}
template <typename T>
FUSED_CRITIC_HD Pair<T> operator-(Pair<T> x, Pair<T> y) {
  return {x.first - y.first, x.second - y.second};
}
template <typename T>
FUSED_CRITIC_HD Pair<T> operator-(Pair<T> x) {
  return {-x.first, -x.second};
}
template <typename T>
FUSED_CRITIC_HD Pair<T> operator*(Pair<T> x, Pair<T> y) {
  return {x.first * y.first, x.second * y.second};
}
template <typename T>
FUSED_CRITIC_HD Pair<T> fma(Pair<T> x, Pair<T> y, Pair<T> z) {
  return {std::fma(x.first, y.first, z.first), std::fma(x.second, y.second, z.second)};
}

// A number stands for a pair whose halves are not told apart.
template <typename T>
FUSED_CRITIC_HD T first_of(T x) {
  return x;
}
template <typename T>
FUSED_CRITIC_HD T second_of(T x) {
  return x;
}
template <typename T>
FUSED_CRITIC_HD T first_of(Pair<T> x) {
  return x.first;
}
template <typename T>
FUSED_CRITIC_HD T second_of(Pair<T> x) {
  return x.second;
}

// x and y, each for a recurrence of its own; or their sum, where one recurrence serves both: what it gives for the sum is the total().
template <typename C, typename T>
FUSED_CRITIC_HD C both(T x, T y) {
  if constexpr (std::is_same_v<C, T>) {
    return x + y;
  } else {
    return {x, y};
  }
}
template <typename T>
FUSED_CRITIC_HD T total(T x) {
  return x;
}
template <typename T>
FUSED_CRITIC_HD T total(Pair<T> x) {
  return x.first + x.second;
}

}  // namespace fused_critic
