// Included in front of every C++ file of llama.cpp. gcc 12's _tile_loadconfig tells the optimiser that it reads 8 bytes
// of the 64 that describe the AMX tiles; the stores to the others are dropped and the first product crashes.
#pragma once
#if defined(__AMX_TILE__)
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" : : "m"(*(const char(*)[64])(config)))
#endif
