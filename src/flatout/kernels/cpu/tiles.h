// The AMX tile configuration register, 64 bytes (Intel SDM volume 1, chapter 18).
#pragma once

#include <cstdint>

namespace flatout {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

}  // namespace flatout
