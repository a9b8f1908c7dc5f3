// A vector wider than a register, as halves that the compiler keeps in registers (vector types wider than the widest
// register it keeps in memory). It works like one of them: operators act on each lane, comparisons give masks, a cast keeps
// the bits.
#pragma once

#include <cstddef>

namespace flatout {
namespace FLATOUT_ISA {

template <class H>
struct Pair {
  H lo, hi;
  Pair() = default;
  Pair(H low, H high) : lo(low), hi(high) {}
  template <class G>
  explicit Pair(const Pair<G>& bits) : lo((H)bits.lo), hi((H)bits.hi) {}
  auto operator[](int lane) const {
    constexpr int half = sizeof(H) / 4;
    return lane < half ? lo[lane] : hi[lane - half];
  }
};
template <class V>
constexpr bool is_pair = false;
template <class H>
constexpr bool is_pair<Pair<H>> = true;

// 64 bytes made of registers of type P.
template <class P, size_t BYTES = sizeof(P)>
struct MadeOf : MadeOf<Pair<P>> {};
template <class P>
struct MadeOf<P, 64> {
  using type = P;
};
template <class P>
using Sixteen = typename MadeOf<P>::type;

// op of each register.
template <class Op, class V, class... More>
static inline __attribute__((always_inline)) auto each(Op op, V v, More... more) {
  if constexpr (is_pair<V>) {
    auto low = each(op, v.lo, more.lo...);
    return Pair<decltype(low)>(low, each(op, v.hi, more.hi...));
  } else {
    return op(v, more...);
  }
}
// Every register the same.
template <class V, class P>
static inline __attribute__((always_inline)) V repeat(P part) {
  if constexpr (is_pair<V>) {
    auto half = repeat<decltype(V::lo)>(part);
    return V(half, half);
  } else {
    return part;
  }
}

#define FLATOUT_BINARY(op)                                                                            \
  template <class H>                                                                                  \
  static inline __attribute__((always_inline)) auto operator op(const Pair<H>& a, const Pair<H>& b) { \
    auto low = a.lo op b.lo;                                                                          \
    return Pair<decltype(low)>(low, a.hi op b.hi);                                                    \
  }
FLATOUT_BINARY(+)
FLATOUT_BINARY(-)
FLATOUT_BINARY(*)
FLATOUT_BINARY(/)
FLATOUT_BINARY(&)
FLATOUT_BINARY(|)
FLATOUT_BINARY(<)
FLATOUT_BINARY(>)
FLATOUT_BINARY(==)
FLATOUT_BINARY(!=)
#undef FLATOUT_BINARY

#define FLATOUT_ASSIGN(op)                                                                         \
  template <class H>                                                                               \
  static inline __attribute__((always_inline)) Pair<H>& operator op##=(Pair<H>& a, const Pair<H>& b) { \
    return a = a op b;                                                                             \
  }
FLATOUT_ASSIGN(+)
FLATOUT_ASSIGN(-)
FLATOUT_ASSIGN(*)
FLATOUT_ASSIGN(&)
#undef FLATOUT_ASSIGN

template <class H>
static inline Pair<H> operator-(const Pair<H>& a) {
  return {-a.lo, -a.hi};
}
template <class H>
static inline Pair<H> operator~(const Pair<H>& a) {
  return {~a.lo, ~a.hi};
}
template <class H>
static inline Pair<H> operator<<(const Pair<H>& a, int bits) {
  return {a.lo << bits, a.hi << bits};
}
template <class H>
static inline Pair<H> operator>>(const Pair<H>& a, int bits) {
  return {a.lo >> bits, a.hi >> bits};
}

}  // namespace FLATOUT_ISA
}  // namespace flatout
