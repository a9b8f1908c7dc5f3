// y = x W^T on Hopper's tensor cores, in tiles that fill the register file. x (T, K) and W (N, K), both bfloat16
// or both e4m3 with a float32 scale a row.
//
// A program multiplies 256 rows of x by N_TILE rows of W, or by one of `parts` equal runs of their columns. Two
// neighbours, a cluster, take the same rows of x, of which each brings half to both. N_TILE / 2 sums a thread
// twice leave 31 registers for the rest: hence no program part of its own for the copies, which the first thread
// asks for between products. What a larger tile saves is traffic: of 256 x 224 a multiplication takes 29 % fewer
// bytes from the second-level cache and 20 % fewer from shared memory than of 256 x 128, time where memory is
// the limit and power where power is.
//
// Given by whoever compiles: N_TILE, STAGES, FP8 (0 or 1), GATE (0: all N columns; 1, 2: of neighbouring columns
// silu(first) or gelu_tanh(first) times the second), and `multiply`, the instruction for 64 rows.
#include "hopper.h"
#include "multiply.h"

constexpr int T_TILE = 256, PAIR = 2, GROUPS = 2, THREADS = 128 * GROUPS;
constexpr int K_TILE = FP8 ? ROW : ROW / 2, SIDE = 8;
constexpr u32 X_BYTES = T_TILE * ROW, W_BYTES = N_TILE * ROW, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int WIDTH = GATE ? N_TILE / 2 : N_TILE;  // numbers of a row that a tile leaves

__device__ __forceinline__ float gated(float gate, float up) {
  float slope = gate;
  if (GATE == 2) slope = 1.5957691216057308f * (gate + 0.044715f * gate * gate * gate);
  return __fdividef(gate, 1.0f + __expf(-slope)) * up;
}

struct Output {
  u16* to;                    // bfloat16 (tokens, width)
  const float* token_scales;  // of e4m3
  const float* row_scales;
  int tokens, width, tile;
};

// A warp's 16 rows of sums, from `row` on, by way of its own piece of shared memory.
__device__ __forceinline__ void store(const float (&sums)[N_TILE / 2], u16* piece, const Output& out, int row) {
  constexpr int PITCH = WIDTH + 8;  // 16 bytes more, against conflicts of banks
  const int lane = threadIdx.x % 32, column = out.tile * WIDTH;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    u16* line = piece + (lane / 4 + 8 * half) * PITCH;
    float token_scale = 1.0f;
    if (FP8) token_scale = out.token_scales[min(row + lane / 4 + 8 * half, out.tokens - 1)];
#pragma unroll
    for (int j = 0; j < N_TILE / 8; ++j) {
      float a = sums[4 * j + 2 * half], b = sums[4 * j + 2 * half + 1];
      if (FP8) {
        const int first = min(out.tile * N_TILE + 8 * j + 2 * (lane % 4), (GATE ? 2 : 1) * out.width - 2);
        a *= token_scale * out.row_scales[first];
        b *= token_scale * out.row_scales[first + 1];
      }
      if (GATE)
        line[4 * j + lane % 4] = (u16)bf16x2(gated(a, b), 0.0f);
      else
        *(u32*)(line + 8 * j + 2 * (lane % 4)) = bf16x2(a, b);
    }
  }
  __syncwarp();
  for (int at = lane; at < 16 * WIDTH / 8; at += 32) {
    const int r = at / (WIDTH / 8), c = at % (WIDTH / 8) * 8;
    if (row + r < out.tokens && column + c < out.width)
      *(uint4*)(out.to + (u64)(row + r) * out.width + column + c) = *(uint4*)(piece + r * PITCH + c);
  }
  __syncwarp();
}

// tiles: of W, even. blocks: of K_TILE columns, a program's, at least STAGES. out: (parts, tokens, width), width
// N or, gated, N / 2.
extern "C" __global__ void __launch_bounds__(THREADS, 1) __cluster_dims__(PAIR, 1, 1)
    wide(const __grid_constant__ Map x, const __grid_constant__ Map w, const float* token_scales,
         const float* row_scales, u16* out, int tokens, int width, int tiles, int parts, int blocks) {
  extern __shared__ unsigned char room[];
  __shared__ u64 barriers[2 * STAGES];
  const u32 stages = (shared_address(room) + 1023) & ~1023u;
  const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
  const int group = threadIdx.x / 128, rank = blockIdx.x % PAIR;
  const bool leader = threadIdx.x == 0;

  // SIDE tiles of tokens meet a pair of tiles of W before the next does, so that the cache has both.
  const int pairs = tiles / PAIR * parts, token_tiles = gridDim.x / (PAIR * pairs);
  const int band = blockIdx.x / PAIR / (SIDE * pairs) * SIDE, side = min(SIDE, token_tiles - band);
  const int place = blockIdx.x / PAIR - band * pairs, pair = place / side;
  const int first = (band + place % side) * T_TILE;
  const int tile = pair / parts * PAIR + rank, part = pair % parts, begin = part * blocks;

  if (leader) {
    for (int s = 0; s < STAGES; ++s) {
      init(full + 8 * s, 1);
      init(empty + 8 * s, GROUPS * PAIR);
    }
    initialised();
  }
  asm volatile("griddepcontrol.launch_dependents;");
  meet_cluster();
  constexpr u32 X_PART = X_BYTES / PAIR;
  const int x_row = first + rank * (T_TILE / PAIR);
  if (leader) {
    for (int s = 0; s < STAGES; ++s) {  // weights before the kernel before this one has ended
      expect(full + 8 * s, STAGE_BYTES);
      load_once(stages + s * STAGE_BYTES + X_BYTES, &w, (begin + s) * K_TILE, tile * N_TILE, full + 8 * s);
    }
    asm volatile("griddepcontrol.wait;" ::: "memory");
    for (int s = 0; s < STAGES; ++s)
      load_for_both(stages + s * STAGE_BYTES + rank * X_PART, &x, (begin + s) * K_TILE, x_row, full + 8 * s);
  }

  float low[N_TILE / 2], high[N_TILE / 2];  // of 64 rows each; the first product overwrites them
  u32 slot = 0, phase = 0, before = STAGES - 1;
  for (int k = 0; k < blocks; ++k) {
    wait(full + 8 * slot, phase);
    const u64 a = descriptor(stages + slot * STAGE_BYTES + group * (X_BYTES / GROUPS));
    const u64 b = descriptor(stages + slot * STAGE_BYTES + X_BYTES);
    before_products();
#pragma unroll
    for (int i = 0; i < ROW / 32; ++i) {
      multiply(low, a + 2 * i, b + 2 * i, k + i);
      multiply(high, a + 2 * i + 64 * ROW / 16, b + 2 * i, k + i);
    }
    commit_products();
    wait_products<1>();
    if (k > 0) {  // the block before has been multiplied: its room is free, in both programs
      if (threadIdx.x % 128 < PAIR) release(empty + 8 * before, threadIdx.x % 128);
      if (leader && k - 1 + STAGES < blocks) {
        wait(empty + 8 * before, slot == 0 ? phase ^ 1 : phase);
        const u32 to = stages + before * STAGE_BYTES;
        const int column = (begin + k - 1 + STAGES) * K_TILE;
        expect(full + 8 * before, STAGE_BYTES);
        load_once(to + X_BYTES, &w, column, tile * N_TILE, full + 8 * before);
        load_for_both(to + rank * X_PART, &x, column, x_row, full + 8 * before);
      }
    }
    before = slot;
    if (++slot == STAGES) slot = 0, phase ^= 1;
  }
  wait_products<0>();
  asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");  // every thread: scales are read and `out` written here
  __syncthreads();
  u16* piece = (u16*)(room + (stages - shared_address(room))) + threadIdx.x / 32 * 16 * (WIDTH + 8);
  const int row = first + group * 128 + threadIdx.x % 128 / 32 * 16;
  const Output its{out + (u64)part * tokens * width, token_scales, row_scales, tokens, width, tile};
  store(low, piece, its, row);
  store(high, piece, its, row + 64);
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");  // the other may still report to barriers here
}
