// IEEE half precision in plain C++: not every compiler has the type on every processor.
#pragma once

#include <cstdint>
#include <cstring>

namespace flatout {

static inline float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
  if (exponent == 0) {
    float v = (float)mantissa * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -v : v;
  }
  bits = exponent == 31 ? sign | 0x7f800000 | mantissa << 13 : sign | (exponent + 112) << 23 | mantissa << 13;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

}  // namespace flatout
