// Runs the simulated accelerator against a model of its memory; Python calls it through a plain C interface.
//
// The memory serves bursts in order, one beat a cycle, `latency` cycles after the request at the earliest, and at most
// `outstanding` at a time. Every `refresh_interval` cycles it stops for `refresh_cycles`; a burst that
// does not follow the last costs `row_cycles` (rows in sequence lie in different banks, which hides their opening), a
// write between reads `turn_cycles`. stall_percent adds random pauses everywhere.
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#include "Vaccelerator.h"
#include "verilated.h"

namespace {

struct Memory {
  uint32_t latency, outstanding, refresh_interval, refresh_cycles, row_cycles, turn_cycles, stall_percent;
};

struct Burst {
  uint64_t ready;
  uint32_t address, beats;
};

struct Simulation {
  VerilatedContext context;
  std::unique_ptr<Vaccelerator> top;
  uint8_t* image;
  uint32_t beats, lanes, columns;
  Memory memory;
  std::deque<Burst> bursts;
  std::deque<uint64_t> acknowledgements;
  uint64_t cycle = 0, busy_until = 0, next_refresh = 0, seed = 1;
  uint32_t follows = ~0u;
  bool opened = false;
  uint64_t beats_read = 0, beats_written = 0, consumed = 0;

  bool stalled() {
    if (!memory.stall_percent) return false;
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    return seed % 100 < memory.stall_percent;
  }
};

}  // namespace

extern "C" {

void* simulation_new(uint8_t* image, uint32_t beats, uint32_t lanes, uint32_t columns, const Memory* memory,
                     uint64_t seed) {
  auto* s = new Simulation;
  s->image = image, s->beats = beats, s->lanes = lanes, s->columns = columns, s->memory = *memory;
  s->seed = seed * 2654435761u + 88172645463325252ull;
  s->next_refresh = memory->refresh_interval;
  s->top = std::make_unique<Vaccelerator>(&s->context);
  s->top->rst = 1;
  for (int i = 0; i < 4; i++) {
    s->top->clk = 0, s->top->eval();
    s->top->clk = 1, s->top->eval();
  }
  s->top->rst = 0;
  return s;
}

void simulation_delete(void* handle) { delete static_cast<Simulation*>(handle); }

void simulation_program(void* handle, const uint64_t* program, uint32_t length) {
  auto* s = static_cast<Simulation*>(handle);
  s->top->program_write = 1;
  for (uint32_t i = 0; i < length; i++) {
    s->top->program_address = i, s->top->program_data = program[i];
    s->top->clk = 0, s->top->eval();
    s->top->clk = 1, s->top->eval();
  }
  s->top->program_write = 0;
}

// One pass over the program. logits: int32 (columns, vocabulary) or null. by_instruction: cycles of each pc, or null.
// vector_memory: int32 (instructions, rows, columns, lanes / 2), filled after each instruction, or null.
// Returns cycles, 0 when the limit is reached, -1 for an address outside the image.
int64_t simulation_run(void* handle, uint32_t count, const uint32_t* tokens, uint32_t position, const uint32_t* block,
                       const uint32_t* offset, int32_t* logits, uint32_t vocabulary, uint64_t* by_instruction,
                       uint64_t limit, uint32_t* best, uint64_t* statistics, uint8_t* vector_memory,
                       uint32_t rows) {
  auto* s = static_cast<Simulation*>(handle);
  auto* top = s->top.get();
  const Memory& m = s->memory;
  const uint32_t lanes = s->lanes;
  std::memcpy(&top->tokens, tokens, 4 * s->columns);
  for (uint32_t c = 0; c < s->columns; c++) {
    std::memcpy(reinterpret_cast<uint8_t*>(&top->block) + 3 * c, &block[c], 3);
    std::memcpy(reinterpret_cast<uint8_t*>(&top->offset) + c, &offset[c], 1);
  }
  top->position = position, top->count = count, top->start = 1;
  const uint64_t begin = s->cycle;
  uint32_t pc = top->running_pc, left = pc;  // of the last cycle, and of the one before
  s->beats_read = s->beats_written = s->consumed = 0;
  while (s->cycle - begin < limit) {
    const uint64_t now = s->cycle++;
    if (m.refresh_interval && now >= s->next_refresh) {
      s->busy_until = (s->busy_until > now ? s->busy_until : now) + m.refresh_cycles;
      s->next_refresh += m.refresh_interval;
    }
    top->beat_valid = 0;
    if (!s->bursts.empty()) {
      Burst& b = s->bursts.front();
      if (b.address != s->follows && !s->opened) {
        s->opened = true;
        s->busy_until = (s->busy_until > now ? s->busy_until : now) + m.row_cycles;
      }
      if (now >= b.ready && now >= s->busy_until && !s->stalled()) {
        std::memcpy(&top->beat_data, s->image + static_cast<size_t>(b.address) * lanes, lanes);
        top->beat_valid = 1;
        s->opened = false;
        s->beats_read++, s->follows = ++b.address;
        if (--b.beats == 0) s->bursts.pop_front();
      }
    }
    top->store_done = 0;
    if (!s->acknowledgements.empty() && now >= s->acknowledgements.front()) {
      top->store_done = 1;
      s->acknowledgements.pop_front();
    }
    top->request_ready = s->bursts.size() < m.outstanding && !s->stalled();
    top->store_ready = !s->stalled();
    top->clk = 0;
    top->eval();
    if (top->request && top->request_ready) {
      if (static_cast<uint64_t>(top->request_address) + top->request_beats > s->beats) return -1;
      s->bursts.push_back({now + m.latency, top->request_address, top->request_beats});
    }
    if (top->store && top->store_ready) {
      if (top->store_address >= s->beats) return -1;
      const auto* strobe = reinterpret_cast<const uint8_t*>(&top->store_strobe);
      const auto* data = reinterpret_cast<const uint8_t*>(&top->store_data);
      uint8_t* to = s->image + static_cast<size_t>(top->store_address) * lanes;
      for (uint32_t i = 0; i < lanes; i++)
        if (strobe[i / 8] >> (i % 8) & 1) to[i] = data[i];
      s->acknowledgements.push_back(now + m.latency);
      s->busy_until = (s->busy_until > now ? s->busy_until : now) + 1 + m.turn_cycles;
      s->beats_written++;
    }
    if (top->logit_valid && logits && top->logit_index < vocabulary) {
      const auto* words = reinterpret_cast<const int32_t*>(&top->logits);
      for (uint32_t c = 0; c < count; c++)
        for (uint32_t i = 0; i <= top->logit_pair; i++)
          logits[static_cast<size_t>(c) * vocabulary + top->logit_index + i] = words[2 * c + i];
    }
#ifndef NETLIST  // which has no ports for looking inside
    // The last results of an instruction arrive while the next one is being read.
    if (vector_memory && pc != left) {
      const size_t size = static_cast<size_t>(s->columns) * lanes * 2;
      for (uint32_t row = 0; row < rows; row++) {
        top->probe_row = row;
        top->eval();
        std::memcpy(vector_memory + (static_cast<size_t>(left) * rows + row) * size, &top->probe_words, size);
      }
    }
#endif
    left = pc;
    pc = top->running_pc;
    if (by_instruction) by_instruction[top->running_pc]++;
    s->consumed += top->consuming;
    const bool done = top->done;
    top->clk = 1;
    top->eval();
    top->start = 0;
    if (done) {
      std::memcpy(best, &top->best, 4 * s->columns);
      statistics[0] = s->beats_read, statistics[1] = s->beats_written, statistics[2] = s->consumed;
      return static_cast<int64_t>(s->cycle - begin);
    }
  }
  return 0;
}

}  // extern "C"
