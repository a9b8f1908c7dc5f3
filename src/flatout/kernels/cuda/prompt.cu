// Causal attention of a prompt on Hopper's tensor cores: out (T, H E) of the last T of S tokens, from queries
// (T, H E), keys and values (S, G E), all bfloat16, E 64 or 128.
//
// A program has three groups of four warps. One brings tiles of 128 keys and values to a ring in shared memory.
// The others own 64 queries of a head each and take turns: while one multiplies, the other exponentiates, which
// takes half as long; and each asks for the scores of the next keys before it reads the values of the last, so
// that its own exponentials are hidden as well. The softmax is one of powers of two; sums are rescaled when a row's
// greatest score has grown by more than 2^GROWTH since, which is seldom. Tiles beyond the diagonal or the window are
// not read. With PAIR 2 two neighbours, a cluster, have two heads of one key/value head, and each brings half of
// what both read.
//
// Given by whoever compiles: E, STAGES of the ring, PAIR (1 or 2), and the instructions `score` (16 columns of 64
// queries, in registers, by 128 keys) and `gather` (64 rows of weights, in registers, by 16 values).
#include "hopper.h"
#include "multiply.h"

constexpr int GROUPS = 2, THREADS = 128 * (GROUPS + 1), ROWS = 64, BLOCK = 128;
constexpr u32 PIECE = BLOCK * ROW, BOX = ROWS * ROW, TILE = E / 64 * PIECE;  // bytes; a piece has 64 columns
constexpr float LOWEST = -1e30f, GROWTH = 8.0f;
constexpr int TURN = 1, OWN = 3;  // named barriers, of each group

struct Shape {
  int tokens, seen, heads, repeat, window;
  float scale;  // of scores, times log2(e)
};

// What a program does: the tile'th of its `workers`, longest first and each round in the other direction, which
// leaves all of them nearly the same to do.
struct Work {
  int head, row, last, end;  // rows of queries from `row` on, tiles of keys from `last` down to `end`
};

__device__ __forceinline__ bool find(Work& work, const Shape& shape, int round) {
  const int workers = gridDim.x / PAIR, worker = blockIdx.x / PAIR, rank = blockIdx.x % PAIR;
  const int columns = shape.heads / PAIR, tiles = (shape.tokens + BLOCK - 1) / BLOCK;
  const int place = round * workers + (round % 2 ? workers - 1 - worker : worker);
  if (place >= columns * tiles) return false;
  const int before = shape.seen - shape.tokens;
  work.head = place % columns * PAIR + rank;
  work.row = (tiles - 1 - place / columns) * BLOCK;
  work.last = (min(before + work.row + BLOCK, shape.seen) - 1) / BLOCK;
  work.end = max(before + work.row + 1 - shape.window, 0) / BLOCK;
  return true;
}

struct Ring {
  u32 slot = 0, phase = 0;
  __device__ __forceinline__ void next() {
    if (++slot == STAGES) slot = 0, phase ^= 1;
  }
};

struct Room {
  u32 queries, tiles;  // two tiles of queries, STAGES of keys and values
  u32 full, empty, queries_full, queries_empty;
};

__device__ __forceinline__ void bring(const Room& room, Ring& ring, const Map* map, int column, int row) {
  wait(room.empty + 8 * ring.slot, ring.phase ^ 1);
  const u32 full = room.full + 8 * ring.slot, to = room.tiles + ring.slot * TILE;
  expect(full, TILE);
#pragma unroll
  for (int piece = 0; piece < E / 64; ++piece) {
    const u32 at = to + piece * PIECE;
    if (PAIR == 2) {
      const int half = blockIdx.x % PAIR;
      load_for_both(at + half * BOX, map, column + 64 * piece, row + half * ROWS, full);
    } else {
      load(at, map, column + 64 * piece, row, full);
      load(at + BOX, map, column + 64 * piece, row + ROWS, full);
    }
  }
  ring.next();
}

__device__ void produce(const Room& room, const Map* q, const Map* k, const Map* v, const Shape& shape) {
  Ring ring;
  Work work;
  for (int round = 0; find(work, shape, round); ++round) {
    const u32 slot = round % 2, full = room.queries_full + 8 * slot;
    wait(room.queries_empty + 8 * slot, round / 2 % 2 ^ 1);
    expect(full, TILE);
    for (int piece = 0; piece < E / 64; ++piece)
      for (int half = 0; half < GROUPS; ++half)
        load(room.queries + slot * TILE + piece * PIECE + half * BOX, q, work.head * E + 64 * piece,
             work.row + half * ROWS, full);
    const int column = work.head / shape.repeat * E;
    bring(room, ring, k, column, work.last * BLOCK);
    for (int n = work.last; n > work.end; --n) {
      bring(room, ring, k, column, (n - 1) * BLOCK);
      bring(room, ring, v, column, n * BLOCK);
    }
    bring(room, ring, v, column, work.end * BLOCK);
  }
}

// What the compiler may not read or move before this place.
template <int count>
__device__ __forceinline__ void settled(float (&values)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

__device__ __forceinline__ void sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ float exp2_of(float x) {
  float found;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(found) : "f"(x));
  return found;
}

// The tile in a slot has been read: its room is free, in both programs.
__device__ __forceinline__ void leave(const Room& room, u32 slot) {
  if (PAIR == 2) {
    if (threadIdx.x % 128 < PAIR) release(room.empty + 8 * slot, threadIdx.x % 128);
  } else {
    if (threadIdx.x % 128 == 0) release(room.empty + 8 * slot);
  }
}

// Until all products are done, once `sum`, of weights, is known: the assembler would wait first, and leave the
// exponentials nothing to hide behind.
__device__ __forceinline__ void wait_behind(float sum) {
  asm volatile("{ .reg .pred never; setp.lt.f32 never, %0, 0f00000000; @never nanosleep.u32 1; }" ::"f"(sum));
  wait_products<0>();
}

// A thread has of two rows, eight apart, every fourth pair of numbers.
struct Rows {
  float peak[2], sum[2], shrink[2];
};

// Queries stay in registers: read anew for every tile of keys they are a fifth of what shared memory gives.
__device__ __forceinline__ void fetch(u32 (&q)[E / 4], u32 queries) {
  const int lane = threadIdx.x % 32, row = lane % 16;
  const u32 line = queries + (threadIdx.x % 128 / 32 * 16 + row) * ROW;
#pragma unroll
  for (int i = 0; i < E / 16; ++i)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(q[4 * i]), "=r"(q[4 * i + 1]), "=r"(q[4 * i + 2]), "=r"(q[4 * i + 3])
                 : "r"(line + i / 4 * PIECE + ((i % 4 * 2 + lane / 16) ^ row % 8) * 16) : "memory");
}

__device__ __forceinline__ void scores_of(float (&s)[BLOCK / 2], const u32 (&q)[E / 4], u32 keys) {
  const u64 b = descriptor(keys);
  before_products();
#pragma unroll
  for (int i = 0; i < E / 16; ++i)
    score(s, q[4 * i], q[4 * i + 1], q[4 * i + 2], q[4 * i + 3], b + ((i / 4 * PIECE + i % 4 * 32) >> 4), i);
  commit_products();
}

__device__ __forceinline__ void gathered(float (&o)[E / 2], const u32 (&p)[BLOCK / 4], u32 values, int add) {
  const u64 b = descriptor(values, PIECE);
  before_products();
#pragma unroll
  for (int i = 0; i < BLOCK / 16; ++i)
    gather(o, p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3], b + (16 * i * ROW >> 4), add + i);
  commit_products();
}

// last: the last key that the first row sees, counted from the thread's first.
__device__ __forceinline__ void mask(float (&s)[BLOCK / 2], int last, int window) {
#pragma unroll
  for (int i = 0; i < BLOCK / 2; ++i) {
    const int key = i / 4 * 8 + i % 2 - i / 2 % 2 * 8;
    if (key > last || key <= last - window) s[i] = LOWEST;
  }
}

// Scores become weights; whether sums so far must shrink, the same for a warp.
template <bool first>
__device__ __forceinline__ bool weigh(float (&s)[BLOCK / 2], Rows& rows, float scale) {
  bool grown = false;
  float high[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float most[2] = {s[2 * h], s[2 * h + 1]};
#pragma unroll
    for (int i = 4; i < BLOCK / 2; i += 4) {
      most[0] = fmaxf(most[0], s[i + 2 * h]);
      most[1] = fmaxf(most[1], s[i + 2 * h + 1]);
    }
    high[h] = fmaxf(most[0], most[1]);
    high[h] = fmaxf(high[h], __shfl_xor_sync(~0u, high[h], 1));
    high[h] = fmaxf(high[h], __shfl_xor_sync(~0u, high[h], 2));
    if (!first) grown |= (high[h] - rows.peak[h]) * scale > GROWTH;
  }
  if (!first) grown = __any_sync(~0u, grown);
  if (first || grown) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float higher = first ? high[h] : fmaxf(high[h], rows.peak[h]);
      rows.shrink[h] = first ? 0.0f : exp2_of((rows.peak[h] - higher) * scale);
      rows.peak[h] = higher;
      rows.sum[h] = first ? 0.0f : rows.sum[h] * rows.shrink[h];
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float base = rows.peak[h] == LOWEST ? 0.0f : rows.peak[h] * scale;  // of rows that saw nothing yet
    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < BLOCK / 2; i += 4)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        s[i + 2 * h + c] = exp2_of(s[i + 2 * h + c] * scale - base);
        sum[c] += s[i + 2 * h + c];
      }
    rows.sum[h] += sum[0] + sum[1];
  }
  return grown;
}

__device__ __forceinline__ void round_to(u32 (&p)[BLOCK / 4], const float (&s)[BLOCK / 2]) {
#pragma unroll
  for (int i = 0; i < BLOCK / 4; ++i) p[i] = bf16x2(s[2 * i], s[2 * i + 1]);
}

__device__ void consume(const Room& room, const Map* out, const Shape& shape, int group) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32, place = warp * 16 + lane / 4;
  const int before = shape.seen - shape.tokens;
  float o[E / 2], s[BLOCK / 2];
  u32 q[E / 4], p[BLOCK / 4];
  Rows rows;
  Ring ring;
  Work work;
  if (group == 1) arrive(TURN, 128 * GROUPS);  // the first group's turn
  for (int round = 0; find(work, shape, round); ++round) {
    const u32 queries = room.queries + round % 2 * TILE + group * BOX;
    const int first = before + work.row + group * ROWS;  // the place of the group's first query
    const auto hide = [&](int n) {
      if ((n + 1) * BLOCK > first + 1 || n * BLOCK <= first + ROWS - 1 - shape.window)
        mask(s, first + place - n * BLOCK - 2 * (lane % 4), shape.window);
    };
    wait(room.queries_full + 8 * (round % 2), round / 2 % 2);
    wait(room.full + 8 * ring.slot, ring.phase);
    fetch(q, queries);
    scores_of(s, q, room.tiles + ring.slot * TILE);
    wait_products<0>();
    settled(s);
    leave(room, ring.slot);
    ring.next();
    hide(work.last);
    weigh<true>(s, rows, shape.scale);
    round_to(p, s);
    for (int n = work.last; n > work.end; --n) {
      const u32 keys = ring.slot;
      wait(room.full + 8 * keys, ring.phase);
      sync(TURN + group, 128 * GROUPS);
      scores_of(s, q, room.tiles + keys * TILE);
      ring.next();
      wait(room.full + 8 * ring.slot, ring.phase);
      gathered(o, p, room.tiles + ring.slot * TILE, n != work.last);
      arrive(TURN + 1 - group, 128 * GROUPS);
      wait_products<1>();
      settled(s);
      leave(room, keys);
      hide(n - 1);
      const bool grown = weigh<false>(s, rows, shape.scale);
      wait_behind(rows.sum[0] + rows.sum[1]);
      settled(o);
      leave(room, ring.slot);
      ring.next();
      if (grown) {
#pragma unroll
        for (int i = 0; i < E / 2; ++i) o[i] *= rows.shrink[i / 2 % 2];
      }
      round_to(p, s);
    }
    wait(room.full + 8 * ring.slot, ring.phase);
    gathered(o, p, room.tiles + ring.slot * TILE, work.last != work.end);
    wait_products<0>();
    settled(o);
    leave(room, ring.slot);
    ring.next();

    // By way of the queries' room, which this group alone has read.
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = rows.sum[h];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const float part = __fdividef(1.0f, sum);
      const u32 line = queries + (place + 8 * h) * ROW + 4 * (lane % 4);
#pragma unroll
      for (int j = 0; j < E / 8; ++j)
        asm volatile("st.shared.b32 [%0], %1;"
                     ::"r"(line + j / 8 * PIECE + (j % 8 ^ lane / 4) * 16),
                       "r"(bf16x2(o[4 * j + 2 * h] * part, o[4 * j + 2 * h + 1] * part)) : "memory");
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    sync(OWN + group, 128);
    if (threadIdx.x % 128 == 0) {
      for (int piece = 0; piece < E / 64; ++piece)
        store(out, work.head * E + 64 * piece, work.row + group * ROWS, queries + piece * PIECE);
      asm volatile("cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;" ::: "memory");
      release(room.queries_empty + 8 * (round % 2));
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) __cluster_dims__(PAIR, 1, 1)
    prompt(const __grid_constant__ Map q, const __grid_constant__ Map k, const __grid_constant__ Map v,
           const __grid_constant__ Map out, int tokens, int seen, int heads, int repeat, int window, float scale) {
  extern __shared__ unsigned char memory[];
  __shared__ u64 barriers[2 * STAGES + 4];
  Room room;
  room.queries = (shared_address(memory) + 1023) & ~1023u;
  room.tiles = room.queries + 2 * TILE;
  room.full = shared_address(barriers);
  room.empty = room.full + 8 * STAGES;
  room.queries_full = room.empty + 8 * STAGES;
  room.queries_empty = room.queries_full + 16;
  const Shape shape{tokens, seen, heads, repeat, window, scale};
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      init(room.full + 8 * s, 1);
      init(room.empty + 8 * s, GROUPS * PAIR);
    }
    for (int s = 0; s < 2; ++s) {
      init(room.queries_full + 8 * s, 1);
      init(room.queries_empty + 8 * s, GROUPS);
    }
    initialised();
  }
  asm volatile("griddepcontrol.launch_dependents;");
  if (PAIR == 2)
    meet_cluster();
  else
    __syncthreads();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 0) {
      asm volatile("griddepcontrol.wait;" ::: "memory");  // what is read and written by others; groups follow
      produce(room, &q, &k, &v, shape);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    consume(room, &out, shape, threadIdx.x / 128 - 1);
  }
  if (PAIR == 2) {  // the other may still report to barriers here
    __syncthreads();
    meet_cluster();
  }
}
