// Where the results of linears go: into the vector memory, to the residual there, through SiLU, or out as logits.
//
// `write` comes with STORE at once, with ADD 4 cycles later, with SILU 13 cycles later, `best` 2 cycles after a logit.
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
  // What the linear's mode is: in registers of its own, because much hangs on it. It has long been still.
  logic four, to_store, to_add, to_silu, to_logits;
  always_ff @(posedge clk) begin
    four <= four_bits;
    to_store <= mode == MODE_STORE;
    to_add <= mode == MODE_ADD;
    to_silu <= mode == MODE_SILU;
    to_logits <= mode == MODE_LOGITS;
  end
  logic [20:0] index;
  assign index = four ? {unit, 1'b0} : {1'b0, unit};

  // ---- ADD: the row is read and held, its words are picked, added, limited
  logic adding;
  logic [4:1] adds;
  logic [4*21-1:0] add_index;
  logic [3*C*64-1:0] add_words;
  logic [C*VL*32-1:0] row2;
  logic [C*64-1:0] picked3;
  logic [C*66-1:0] sums4;
  assign adding = ready && to_add;
  assign read = adding;
  assign read_row = target + ROWS_LOG2'(index >> VLB);
  function automatic logic [31:0] limit(input logic [32:0] x);
    limit = x[32] == x[31] ? x[31:0] : x[32] ? 32'h80000000 : 32'h7fffffff;
  endfunction
  always_ff @(posedge clk) begin
    adds <= rst ? '0 : {adds[3:1], adding};
    add_index <= {add_index[3*21-1:0], index};
    add_words <= {add_words[2*C*64-1:0], word1, word0};
    if (adds[1]) row2 <= row;
    if (adds[2])
      for (int c = 0; c < C; c++) begin
        picked3[c*32+:32] <= row2[(c*VL+32'(add_index[21+:VLB]))*32+:32];
        picked3[(C+c)*32+:32] <= row2[(c*VL+32'(add_index[21+:VLB]|VLB'(1)))*32+:32];
      end
    if (adds[3])
      for (int i = 0; i < 2 * C; i++)
        sums4[i*33+:33] <= 33'($signed(picked3[i*32+:32])) + 33'($signed(add_words[(4*C+i)*32+:32]));
  end

  // ---- SILU: gate and up come as a pair, or one after the other
  logic hold_gate, silu_start;
  logic [C*32-1:0] held, silu_word;
  logic [13:1] silus;
  logic [13*20-1:0] silu_index;
  assign hold_gate = to_silu && !four && !unit[0];
  assign silu_start = ready && to_silu && !hold_gate;
  for (genvar c = 0; c < C; c++) begin : g_silu
    silu_product silu (
        .clk, .gate(four ? word0[c*32+:32] : held[c*32+:32]), .up(four ? word1[c*32+:32] : word0[c*32+:32]),
        .word(silu_word[c*32+:32])
    );
  end
  always_ff @(posedge clk) begin
    if (ready && hold_gate) held <= word0;
    silus <= rst ? '0 : {silus[12:1], silu_start};
    silu_index <= {silu_index[12*20-1:0], four ? unit : {1'b0, unit[19:1]}};
  end

  // ---- write
  logic [20:0] write_index;
  logic pair;
  always_comb begin
    write = 1'b1;
    write_index = index;
    pair = four;
    write_word0 = word0;
    write_word1 = four ? word1 : word0;
    if (silus[13]) begin
      write_index = {1'b0, silu_index[12*20+:20]};
      pair = 1'b0;
      write_word0 = silu_word;
      write_word1 = silu_word;
    end else if (adds[4]) begin
      write_index = add_index[3*21+:21];
      for (int c = 0; c < C; c++) begin
        write_word0[c*32+:32] = limit(sums4[c*33+:33]);
        write_word1[c*32+:32] = limit(sums4[(four?C+c:c)*33+:33]);
      end
    end else write = ready && to_store;
  end
  assign write_row = target + ROWS_LOG2'(write_index >> VLB);
  assign write_mask = VL'(pair ? 3 : 1) << write_index[VLB-1:0];

  // ---- logits: the larger of a pair, then the largest of all; of equal ones the first
  logic logit1, first1;
  logic [C*32-1:0] larger1, best_word;
  logic [C*21-1:0] larger_index1;
  assign logit_valid = ready && to_logits;
  assign logit_index = {11'b0, index};
  always_ff @(posedge clk) begin
    logit1 <= logit_valid && !rst;
    first1 <= unit == 0;
    for (int c = 0; c < C; c++) begin
      larger1[c*32+:32] <= word0[c*32+:32];
      larger_index1[c*21+:21] <= index;
      if (four && $signed(word0[c*32+:32]) < $signed(word1[c*32+:32])) begin
        larger1[c*32+:32] <= word1[c*32+:32];
        larger_index1[c*21+:21] <= index | 21'd1;
      end
      if (logit1 && (first1 || $signed(best_word[c*32+:32]) < $signed(larger1[c*32+:32]))) begin
        best_word[c*32+:32] <= larger1[c*32+:32];
        best[c*32+:32] <= {11'b0, larger_index1[c*21+:21]};
      end
    end
  end
endmodule
