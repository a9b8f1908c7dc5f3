// Where the results of linears go: into the vector memory, to the residual there, through SiLU, or out as logits.
//
// `write` comes with STORE at once, with ADD 3 cycles later, with SILU 10 cycles later.
module results #(
    parameter int C = 4,
    parameter int VL = 32,
    parameter int ROWS_LOG2 = 8
) (
    input logic clk,
    input logic rst,
    input logic [3:0] mode,
    input logic four_bits,
    input logic [ROWS_LOG2-1:0] target,
    // a row, or a pair of 4-bit rows, is ready
    input logic ready,
    input logic [19:0] unit,
    input logic [C*32-1:0] word0,
    input logic [C*32-1:0] word1,
    // vector memory
    output logic read,
    output logic [ROWS_LOG2-1:0] read_row,
    input logic [C*VL*32-1:0] row,  // a cycle later
    output logic write,
    output logic [ROWS_LOG2-1:0] write_row,
    output logic [VL-1:0] write_mask,
    output logic [C*32-1:0] write_word0,  // for even places
    output logic [C*32-1:0] write_word1,  // for odd places
    // logits
    output logic logit_valid,
    output logic [31:0] logit_index,
    output logic [C*32-1:0] best
);
`include "isa.svh"
  localparam int VLB = $clog2(VL);
  logic [20:0] index;
  assign index = four_bits ? {unit, 1'b0} : {1'b0, unit};

  // ---- ADD: the row is read, its words are picked, added, limited
  logic adding;
  logic [3:1] adds;
  logic [3*21-1:0] add_index;
  logic [2*C*64-1:0] add_words;
  logic [C*64-1:0] picked2;
  logic [C*66-1:0] sums3;
  assign adding = ready && mode == MODE_ADD;
  assign read = adding;
  assign read_row = target + ROWS_LOG2'(index >> VLB);
  function automatic logic [31:0] limit(input logic [32:0] x);
    limit = x[32] == x[31] ? x[31:0] : x[32] ? 32'h80000000 : 32'h7fffffff;
  endfunction
  always_ff @(posedge clk) begin
    adds <= rst ? '0 : {adds[2:1], adding};
    add_index <= {add_index[2*21-1:0], index};
    add_words <= {add_words[C*64-1:0], word1, word0};
    if (adds[1])
      for (int c = 0; c < C; c++) begin
        picked2[c*32+:32] <= row[(c*VL+32'(add_index[VLB-1:0]))*32+:32];
        picked2[(C+c)*32+:32] <= row[(c*VL+32'(add_index[VLB-1:0]|VLB'(1)))*32+:32];
      end
    if (adds[2])
      for (int i = 0; i < 2 * C; i++)
        sums3[i*33+:33] <= 33'($signed(picked2[i*32+:32])) + 33'($signed(add_words[(2*C+i)*32+:32]));
  end

  // ---- SILU: gate and up come as a pair, or one after the other
  logic hold_gate, silu_start;
  logic [C*32-1:0] held, silu_word;
  logic [10:1] silus;
  logic [10*20-1:0] silu_index;
  assign hold_gate = mode == MODE_SILU && !four_bits && !unit[0];
  assign silu_start = ready && mode == MODE_SILU && !hold_gate;
  for (genvar c = 0; c < C; c++) begin : g_silu
    silu_product silu (
        .clk, .gate(four_bits ? word0[c*32+:32] : held[c*32+:32]),
        .up(four_bits ? word1[c*32+:32] : word0[c*32+:32]), .word(silu_word[c*32+:32])
    );
  end
  always_ff @(posedge clk) begin
    if (ready && hold_gate) held <= word0;
    silus <= rst ? '0 : {silus[9:1], silu_start};
    silu_index <= {silu_index[9*20-1:0], four_bits ? unit : {1'b0, unit[19:1]}};
  end

  // ---- write
  logic [20:0] write_index;
  logic pair;
  always_comb begin
    write = 1'b1;
    write_index = index;
    pair = four_bits;
    write_word0 = word0;
    write_word1 = four_bits ? word1 : word0;
    if (silus[10]) begin
      write_index = {1'b0, silu_index[9*20+:20]};
      pair = 1'b0;
      write_word0 = silu_word;
      write_word1 = silu_word;
    end else if (adds[3]) begin
      write_index = add_index[2*21+:21];
      for (int c = 0; c < C; c++) begin
        write_word0[c*32+:32] = limit(sums3[c*33+:33]);
        write_word1[c*32+:32] = limit(sums3[(four_bits?C+c:c)*33+:33]);
      end
    end else write = ready && mode == MODE_STORE;
  end
  assign write_row = target + ROWS_LOG2'(write_index >> VLB);
  assign write_mask = VL'(pair ? 3 : 1) << write_index[VLB-1:0];

  // ---- logits
  logic [C*32-1:0] best_word;
  assign logit_valid = ready && mode == MODE_LOGITS;
  assign logit_index = {11'b0, index};
  always_ff @(posedge clk)
    if (logit_valid)
      for (int c = 0; c < C; c++) begin
        if (index == 0 || $signed(best_word[c*32+:32]) < $signed(word0[c*32+:32])) begin
          best_word[c*32+:32] <= word0[c*32+:32];
          best[c*32+:32] <= {11'b0, index};
        end
        if (four_bits && $signed(word0[c*32+:32]) < $signed(word1[c*32+:32])
            && (index == 0 || $signed(best_word[c*32+:32]) < $signed(word1[c*32+:32]))) begin
          best_word[c*32+:32] <= word1[c*32+:32];
          best[c*32+:32] <= {11'b0, index} + 32'd1;
        end
      end
endmodule
