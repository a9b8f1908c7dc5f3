// Scores of a key head's queries as they become ready, then weighted sums of its values, divided and read out.
//
// A column is a query head: only the first columns of the accelerator have one. The sequencer says which phase it is; keys
// and values come from the walker.
module attention #(
    parameter int KW = 64,
    parameter int C = 4,
    parameter int HEAD_CHUNKS = 4,
    parameter int CONTEXT_LOG2 = 11,
    parameter int BITS = KW * 8,
    parameter int DRAIN = KW < 16 ? 1 : KW / 16,
    parameter int PLACES = $clog2(KW / DRAIN)  // log2 of the writes that a chunk takes
) (
    input logic clk,
    input logic rst,
    input logic [C-1:0] use_column,
    // scores
    input logic keys,
    input logic [C-1:0] ready,
    input logic [19:0] ready_unit,
    input logic [C*32-1:0] word,
    // values
    input logic values,
    input logic take,
    input logic [19:0] unit,
    input logic take1,
    input logic first_unit1,
    input logic [1:0] chunk1,
    input logic [15:0] scale1,
    input logic [BITS-1:0] beat1,
    // divided and read out, DRAIN words a write
    input logic finish,  // sums are complete
    input logic [15:0] code_factor,
    input logic [2:0] head_chunks,
    input logic [7:0] group_heads,
    output logic drained,
    output logic write,
    output logic [15:0] write_at,  // in units of DRAIN words, from the first query of this key head
    output logic [DRAIN*32-1:0] write_words
);
  logic value1;
  logic [10*BITS-1:0] beats;
  logic finishing;
  logic [C-1:0] divided;
  logic [C*16-1:0] inverses;
  logic [C*6-1:0] shifts;
  logic [C*DRAIN*48-1:0] drains;
  logic draining;
  logic [5:0] drain_index;
  assign value1 = take1 && values;
  always_ff @(posedge clk) begin
    if (values) beats <= {beats[9*BITS-1:0], beat1};
    finishing <= finish && !rst;
  end
  for (genvar c = 0; c < C; c++) begin : g_head
    logic [31:0] score, total;
    logic signed [31:0] largest;
    logic [6:0] digits;
    logic [5:0] excess;
    logic [15:0] denominator;
    ram #(
        .WIDTH(32), .DEPTH_LOG2(CONTEXT_LOG2)
    ) scores (
        .clk, .read(take && values && use_column[c]), .read_address(unit[CONTEXT_LOG2-1:0]), .out(score),
        .write(keys && ready[c]), .write_address(ready_unit[CONTEXT_LOG2-1:0]),
`ifdef PROBE
        .probe_address('0), .probe(),
`endif
        .in(word[c*32+:32])
    );
    always_ff @(posedge clk)
      if (keys && ready[c] && (ready_unit == 0 || largest < $signed(word[c*32+:32]))) largest <= word[c*32+:32];
    weighted_sum #(
        .KW(KW), .CHUNKS(HEAD_CHUNKS)
    ) sums (
        .clk, .valid(value1 && use_column[c]), .first_token(first_unit1), .chunk(chunk1), .score, .largest,
        .scale(scale1), .codes10(beats[9*BITS+:BITS]), .total, .drain_index, .drain(drains[c*DRAIN*48+:DRAIN*48])
    );
    leading_digits digits_of_total (.clk, .x({32'b0, total}), .digits);
    always_ff @(posedge clk) begin
      excess <= 6'(digits - 7'd16);
      denominator <= 16'(total >> excess);
      shifts[c*6+:6] <= 6'd20 + excess;
    end
    divide divider (
        .clk, .rst, .start(finishing), .numerator(code_factor), .denominator, .done(divided[c]),
        .quotient(inverses[c*16+:16])
    );
  end

  // ---- read out: a counter in stage 0, sums of all columns in 3, of one in 4, words in 9
  localparam int STAGES = 9;
  logic [7:0] in_group;
  logic [15:0] count;
  logic [STAGES:1] drain_valid;
  logic [STAGES*16-1:0] drain_at;
  logic [7:0] in_group1, in_group2, in_group3;
  logic [DRAIN*48-1:0] picked4;
  logic [15:0] inverse4;
  logic [5:0] shift4;
  always_ff @(posedge clk) begin
    drained <= 1'b0;
    if (divided[0]) begin
      draining <= 1'b1;
      in_group <= '0;
      drain_index <= '0;
      count <= '0;
    end else if (draining) begin
      count <= count + 16'd1;
      drain_index <= drain_index + 6'd1;
      if (drain_index + 6'd1 == 6'({head_chunks, {PLACES{1'b0}}})) begin
        drain_index <= '0;
        in_group <= in_group + 8'd1;
        if (in_group + 8'd1 == group_heads) draining <= 1'b0;
      end
    end
    drain_valid <= {drain_valid[STAGES-1:1], draining};
    drain_at <= {drain_at[(STAGES-1)*16-1:0], count};
    in_group1 <= in_group;
    {in_group3, in_group2} <= {in_group2, in_group1};
    for (int c = 0; c < C; c++)
      if (in_group3 == 8'(c)) begin
        picked4 <= drains[c*DRAIN*48+:DRAIN*48];
        inverse4 <= inverses[c*16+:16];
        shift4 <= shifts[c*6+:6];
      end
    drained <= drain_valid[STAGES] && !drain_valid[STAGES-1];
    if (rst) begin
      draining <= 1'b0;
      drain_valid <= '0;
    end
  end
  for (genvar i = 0; i < DRAIN; i++) begin : g_word
    rescale scaled (
        .clk, .sum(picked4[i*48+:48]), .mantissa(inverse4), .shift(shift4), .narrow(1'b1),
        .word(write_words[i*32+:32])
    );
  end
  assign write = drain_valid[STAGES];
  assign write_at = drain_at[(STAGES-1)*16+:16];
endmodule
