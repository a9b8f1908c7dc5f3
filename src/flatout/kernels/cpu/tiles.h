// The AMX tile configuration register, 64 bytes (Intel SDM volume 1, chapter 18).
#pragma once

#include <cstdint>

namespace flatout {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Not _tile_loadconfig: gcc 12 tells the optimiser that it reads 8 bytes, and the rest of the structure is dropped.
static inline void load_tile_config(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }

}  // namespace flatout
