// Gives on_chip its first token and then back whatever it answers.
#include <cstdint>

#include "Von_chip.h"
#include "verilated.h"

// Fills answers (count,), unless `limit` cycles pass before.
extern "C" void answers(uint16_t token, uint32_t count, uint16_t* answers, uint64_t limit) {
  VerilatedContext context;
  Von_chip chip(&context);
  chip.rst = 1;
  chip.token = token;
  for (uint64_t cycle = 0, found = 0; cycle < limit && found < count; cycle++) {
    chip.clk = 0;
    chip.eval();
    chip.rst = cycle < 4;
    chip.token_valid = chip.ready;
    if (chip.next_valid) answers[found++] = chip.token = chip.next;
    chip.clk = 1;
    chip.eval();
  }
}
