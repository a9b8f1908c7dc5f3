// What the checks share: numbers that are the same on every processor, complaints, and a digest of results.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

using Floats = std::vector<float>;

inline int failures = 0;
inline uint64_t state = 1, digest;

inline uint32_t random_bits() {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return (uint32_t)(state >> 33);
}
inline float random_float() { return (float)(int32_t)(random_bits() - (1u << 30)) / (float)(1 << 29); }  // -2 .. 2
inline Floats random_floats(size_t n) {
  Floats v(n);
  for (float& x : v) x = random_float();
  return v;
}
inline void expect(bool good, const std::string& what) {
  if (good) return;
  ++failures;
  std::printf("wrong: %s\n", what.c_str());
}
inline void start_digest() { digest = 14695981039346656037ull; }
template <class T>
void add_to_digest(const std::vector<T>& v) {
  static_assert(sizeof(T) == 4);
  for (const T& x : v) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    digest = (digest ^ bits) * 1099511628211ull;
  }
}
