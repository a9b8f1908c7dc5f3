// The whole accelerator: fetch -> beat FIFO -> walker -> columns -> vector memory, with the sequencer beside it.
//
// A beat of KW bytes is one chunk of a row of 8-bit weights, of two rows of 4-bit weights, of a key or of a value. C
// columns use each beat: tokens of a linear, query heads of a key. docs/fpga.md describes the instructions.
module accelerator #(
    parameter int KW = 64,
    parameter int C = 4,
    parameter int CB = 2,
    parameter int PC = 10,
    parameter int ROWS_LOG2 = 8,  // of vector memory, a token
    parameter int CODES_LOG2 = 6,  // rows of codes, a column
    parameter int CONTEXT_LOG2 = 11,
    parameter int FIFO_LOG2 = 9,
    parameter int BURST_LOG2 = 6,
    parameter int HEADS_LOG2 = 5,  // query heads
    parameter int VL = KW / 2,
    parameter int BITS = KW * 8
) (
    input logic clk,
    input logic rst,
    // host
    input logic program_write,
    input logic [PC-1:0] program_address,
    input logic [63:0] program_data,
    input logic start,
    input logic [CB:0] count,  // tokens, 1 to C
    input logic [C*32-1:0] tokens,
    input logic [31:0] position,  // of the first
    input logic [C*24-1:0] block,  // where the keys of each token are: block and place in it
    input logic [C*8-1:0] offset,
    output logic done,
    output logic [C*32-1:0] best,  // index of each token's largest logit
    // logits as they are made
    output logic logit_valid,
    output logic logit_pair,
    output logic [31:0] logit_index,
    output logic [C*64-1:0] logits,
    // memory
    output logic request,
    input logic request_ready,
    output logic [31:0] request_address,  // in beats
    output logic [BURST_LOG2:0] request_beats,
    input logic beat_valid,
    input logic [BITS-1:0] beat_data,
    output logic store,
    input logic store_ready,
    output logic [31:0] store_address,
    output logic [KW-1:0] store_strobe,
    output logic [BITS-1:0] store_data,
    input logic store_done,  // one write has reached the memory
`ifdef PROBE
    // for tests: a row of every column's vector memory
    input logic [ROWS_LOG2-1:0] probe_row,
    output logic [C*VL*32-1:0] probe_words,
`endif
    // what runs
    output logic [3:0] running,
    output logic [PC-1:0] running_pc,
    output logic consuming
);
`include "isa.svh"
  localparam int DOT = 12;
  localparam int VLB = $clog2(VL);
  localparam int DRAIN = KW / 16;

  // ---- program memory, read by the fetcher and the sequencer
  logic [63:0] program_mem[0:(1<<PC)-1];
  logic [63:0] fetched, instruction;
  logic [PC-1:0] fetch_pc, pc;
  always_ff @(posedge clk) begin
    if (program_write) program_mem[program_address] <= program_data;
    fetched <= program_mem[fetch_pc];
    instruction <= program_mem[pc];
  end

  // ---- settings
  logic [2:0] head_chunks;
  logic [7:0] block_beats, kv_heads, query_heads, group_heads;
  logic [31:0] head_stride, value_offset, epsilon;
  logic [15:0] code_factor, norm_factor, score_factor;
  logic [7:0] score_shift;
  logic [ROWS_LOG2-1:0] scratch;
  logic [3:0] mode;
  logic four_bits;
  logic [7:0] mode_shift;
  logic [ROWS_LOG2-1:0] target;

  typedef enum logic [3:0] {
    IDLE, LOAD, DECODE, EMBED, TURNS, VECTOR, GEMV, KEYS, VALUES, DIVIDE, READ_OUT, FENCE, NEXT
  } state_t;
  state_t state;
  logic [63:0] now;
  logic [3:0] op;
  assign op = now[63:60];
  assign running = state;
  assign running_pc = pc;

  // ---- fetch
  logic fifo_valid, pop, fence_open;
  logic [BITS-1:0] beat;
  logic [15:0] stores_open;
  fetch #(
      .C(C), .CB(CB), .PC(PC), .FIFO_LOG2(FIFO_LOG2), .BURST_LOG2(BURST_LOG2)
  ) fetcher (
      .clk, .rst, .start, .count, .tokens, .position, .block, .offset,
      .pc(fetch_pc), .instruction(fetched), .fence_open, .fence_pc(pc),
      .request, .request_ready, .address(request_address), .beats(request_beats), .popped(pop)
  );
  beat_fifo #(
      .WIDTH(BITS), .DEPTH_LOG2(FIFO_LOG2)
  ) fifo (
      .clk, .rst, .push(beat_valid), .in(beat_data), .valid(fifo_valid), .pop, .out(beat)
  );

  // ---- memories of each column
  logic [C-1:0] active;  // tokens
  always_comb for (int c = 0; c < C; c++) active[c] = (CB + 1)'(c) < count;
  logic read;
  logic [ROWS_LOG2-1:0] read_row;
  logic [VL*32-1:0] row[0:C-1];
  logic write;
  logic [C-1:0] write_columns;
  logic [ROWS_LOG2-1:0] write_row;
  logic [VL-1:0] write_mask;
  logic write_pairs, write_single;
  logic [VL*32-1:0] write_words;
  logic [31:0] write_word0[0:C-1], write_word1[0:C-1];
  logic code_write, code_half;
  logic [CB-1:0] code_column;
  logic [7:0] code_row;
  logic [VL*8-1:0] codes;
  logic [CODES_LOG2-1:0] activation_row;
  logic [BITS-1:0] activation[0:C-1];
  logic take;
  for (genvar c = 0; c < C; c++) begin : g_memory
    logic [VL*32-1:0] words[0:(1<<ROWS_LOG2)-1];
    logic [BITS-1:0] code_rows[0:(1<<CODES_LOG2)-1];
`ifdef PROBE
    assign probe_words[c*VL*32+:VL*32] = words[probe_row];
`endif
    always_ff @(posedge clk) begin
      if (read) row[c] <= words[read_row];
      if (write && write_columns[c])
        for (int w = 0; w < VL; w++)
          if (write_mask[w])
            words[write_row][w*32+:32] <= write_pairs ? (w % 2 == 1 ? write_word1[c] : write_word0[c])
                                        : write_single ? write_word0[c] : write_words[w*32+:32];
      if (take) activation[c] <= code_rows[activation_row];
      if (code_write && code_column == CB'(c)) begin
        if (code_half) code_rows[code_row[CODES_LOG2-1:0]][BITS-1:BITS/2] <= codes;
        else code_rows[code_row[CODES_LOG2-1:0]][BITS/2-1:0] <= codes;
      end
    end
  end
  logic [BITS-1:0] turns[0:C*8-1];
  logic [BITS-1:0] turn;
  logic [3:0] turn_row;
  logic [CB-1:0] turn_column, load_token;
  logic [ROWS_LOG2-1:0] load_row;
  always_ff @(posedge clk) begin
    turn <= turns[{turn_column, turn_row[2:0]}];
    if (state == TURNS && fifo_valid) turns[{load_token, load_row[2:0]}] <= beat;
  end

  // ---- vector unit
  logic vector_start, vector_done, vector_pop, vector_read, vector_write;
  logic [ROWS_LOG2-1:0] vector_read_row, vector_write_row;
  logic [CB-1:0] vector_read_column, vector_write_column, scale_column;
  logic [CB-1:0] vector_column1;
  logic [VL*32-1:0] vector_words;
  logic spread_write, scale_write, query_write;
  logic [7:0] spread_chunk, scale_head;
  logic [1:0] spread;
  logic [15:0] scale_mantissa;
  logic signed [7:0] scale_shift;
  always_ff @(posedge clk) vector_column1 <= vector_read_column;
  vector #(
      .KW(KW), .C(C), .CB(CB), .ROWS_LOG2(ROWS_LOG2)
  ) vectors (
      .clk, .rst, .start(vector_start), .op(op == OP_NORM ? 2'd0 : op == OP_CODES ? 2'd1 : 2'd2), .count,
      .source(now[40+:ROWS_LOG2]), .rows(now[32+:ROWS_LOG2]), .scratch, .gamma_shift(now[53:48]), .epsilon,
      .factor(op == OP_NORM ? norm_factor : code_factor), .score_factor, .head_chunks, .query_heads, .kv_heads,
      .group_heads, .cache(now[31:0]), .head_stride, .value_offset, .block_beats, .block, .offset,
      .done(vector_done), .beat_valid(fifo_valid), .beat, .beat_pop(vector_pop),
      .turn_row, .turn_column, .turn,
      .read(vector_read), .read_row(vector_read_row), .read_column(vector_read_column), .row(row[vector_column1]),
      .write(vector_write), .write_row(vector_write_row), .write_column(vector_write_column),
      .write_words(vector_words),
      .code_write, .code_column, .code_row, .code_half, .codes, .spread_write, .spread_chunk, .spread,
      .scale_write, .query_write, .scale_column, .scale_head, .scale_mantissa, .scale_shift,
      .store, .store_ready, .store_address, .store_strobe, .store_data
  );

  // ---- multipliers: of each token, and of each query head of each token
  logic [15:0] token_mantissa[0:C-1], query_mantissa[0:(C<<HEADS_LOG2)-1], use_mantissa[0:C-1];
  logic signed [7:0] token_shift[0:C-1], query_shift[0:(C<<HEADS_LOG2)-1];
  logic [5:0] use_shift[0:C-1];
  logic [1:0] spreads[0:C*64-1];
  always_ff @(posedge clk) begin
    if (scale_write) begin
      token_mantissa[scale_column] <= scale_mantissa;
      token_shift[scale_column] <= scale_shift;
    end
    if (query_write) begin
      query_mantissa[{scale_column, scale_head[HEADS_LOG2-1:0]}] <= scale_mantissa;
      query_shift[{scale_column, scale_head[HEADS_LOG2-1:0]}] <= scale_shift;
    end
    if (spread_write) spreads[{scale_column, spread_chunk[5:0]}] <= spread;
  end

  // ---- walker: beats of the FIFO as scales and chunks of rows
  logic walking, walk_start, four, keys, values, linear;
  logic [19:0] unit, units;
  logic [7:0] chunk, chunks, scales_left, scale_period;
  logic [BITS-1:0] scale_beat;
  logic [CODES_LOG2-1:0] activation_base;
  logic scale_take;
  assign keys = state == KEYS;
  assign values = state == VALUES;
  assign linear = state == GEMV;
  assign four = linear && four_bits;
  assign scale_take = walking && fifo_valid && scales_left == 0;
  assign take = walking && fifo_valid && scales_left != 0;
  assign consuming = scale_take || take;
  assign activation_row = activation_base + CODES_LOG2'(chunk);
  // stage 1
  logic take1, first1, last1, end1, first_unit1;
  logic [BITS-1:0] beat1;
  logic [31:0] scale1;
  logic [19:0] unit1;
  logic [7:0] chunk1;
  logic [BITS-1:0] low1, high1;
  always_ff @(posedge clk) begin
    take1 <= take && !rst;
    if (scale_take) begin
      scale_beat <= beat;
      scales_left <= scale_period;
    end
    if (take) begin
      beat1 <= beat;
      scale1 <= scale_beat[31:0];
      scale_beat <= four ? scale_beat >> 32 : scale_beat >> 16;
      scales_left <= scales_left - 8'd1;
      first1 <= chunk == 0;
      last1 <= chunk + 8'd1 == chunks;
      first_unit1 <= unit == 0;
      unit1 <= unit;
      chunk1 <= chunk;
      chunk <= chunk + 8'd1;
      if (chunk + 8'd1 == chunks) begin
        chunk <= '0;
        unit <= unit + 20'd1;
        if (unit + 20'd1 == units) walking <= 1'b0;
      end
    end
    if (walk_start) begin
      walking <= 1'b1;
      unit <= '0;
      chunk <= '0;
      scales_left <= '0;
    end
    if (rst) walking <= 1'b0;
  end
  // 4-bit codes: the first row in the low half of the beat, the second in the high half
  always_comb begin
    low1 = beat1;
    high1 = '0;
    if (four)
      for (int i = 0; i < KW; i++) begin
        low1[i*8+:8] = {{4{beat1[i*4+3]}}, beat1[i*4+:4]};
        high1[i*8+:8] = {{4{beat1[BITS/2+i*4+3]}}, beat1[BITS/2+i*4+:4]};
      end
  end

  // ---- columns
  localparam int TAG = 1 + 1 + 1 + 20 + 32 + C * 2;
  logic [TAG-1:0] tag1, tag[0:DOT-1];
  logic [DOT-1:0] travelling;
  logic dot_take;
  assign dot_take = take1 && !values;
  always_comb begin
    tag1 = '0;
    tag1[TAG-1:C*2] = {dot_take, first1, last1, unit1, scale1};
    for (int c = 0; c < C; c++)
      tag1[c*2+:2] = keys ? 2'd3 : spreads[{CB'(c), chunk1[5:0]}];
  end
  always_ff @(posedge clk) begin
    tag[0] <= tag1;
    for (int i = 1; i < DOT; i++) tag[i] <= tag[i-1];
    travelling <= {travelling[DOT-2:0], dot_take && !rst};
  end
  logic tag_valid, tag_first, tag_last;
  logic [19:0] tag_unit, unit2, unit3, unit4, unit5, ready_unit;
  logic [31:0] tag_scale;
  logic [C*2-1:0] tag_spread;
  assign {tag_valid, tag_first, tag_last, tag_unit, tag_scale, tag_spread} = tag[DOT-1];
  logic [C-1:0] ready, use_column;
  logic signed [31:0] word0[0:C-1], word1[0:C-1];
  assign use_column = keys || values ? C'((1 << group_heads) - 1) : active;
  for (genvar c = 0; c < C; c++) begin : g_column
    logic signed [21:0] dot0, dot1;
    dot_pair #(
        .KW(KW), .LATENCY(DOT)
    ) dots (
        .clk, .enable(dot_take && use_column[c]), .low(low1), .high(high1), .activation(activation[c]),
        .low_sum(dot0), .high_sum(dot1)
    );
    column columns (
        .clk, .valid(tag_valid && use_column[c]), .first(tag_first), .last(tag_last),
        .narrow(keys || mode != MODE_ADD), .dot0, .dot1, .scale0(tag_scale[15:0]), .scale1(tag_scale[31:16]),
        .spread(tag_spread[c*2+:2]), .mantissa(use_mantissa[c]), .shift(use_shift[c]),
        .ready(ready[c]), .word0(word0[c]), .word1(word1[c])
    );
  end
  always_ff @(posedge clk) begin
    unit2 <= tag_unit;
    unit3 <= unit2;
    unit4 <= unit3;
    ready_unit <= unit4;
  end

  // ---- results of linears: into the vector memory, added there, through SiLU, or out as logits
  logic results, hold_gate;
  logic [31:0] gate[0:C-1], silu_gate[0:C-1], silu_up[0:C-1], silu_word[0:C-1];
  logic silu_start;
  logic [4:0] silu_valid;
  logic [20:0] index, silu_index[0:4];
  logic add1, add_pair1;
  logic [20:0] add_index1;
  logic [31:0] add_word0[0:C-1], add_word1[0:C-1];
  assign results = ready[0] && linear;
  assign index = four ? {ready_unit, 1'b0} : {1'b0, ready_unit};
  assign hold_gate = mode == MODE_SILU && !four && !ready_unit[0];
  for (genvar c = 0; c < C; c++) begin : g_silu
    assign silu_gate[c] = four ? word0[c] : gate[c];
    assign silu_up[c] = four ? word1[c] : word0[c];
    silu_product silus (.clk, .gate(silu_gate[c]), .up(silu_up[c]), .word(silu_word[c]));
  end
  assign silu_start = results && mode == MODE_SILU && !hold_gate;
  logic signed [32:0] sum0[0:C-1], sum1[0:C-1];
  always_comb
    for (int c = 0; c < C; c++) begin
      sum0[c] = $signed(row[c][add_index1[VLB-1:0]*32+:32]) + $signed(add_word0[c]);
      sum1[c] = $signed(row[c][(add_index1[VLB-1:0]|VLB'(1))*32+:32]) + $signed(add_word1[c]);
    end
  function automatic logic [31:0] limit(input logic signed [32:0] x);
    limit = x[32] == x[31] ? x[31:0] : x[32] ? 32'h80000000 : 32'h7fffffff;
  endfunction
  always_ff @(posedge clk) begin
    if (results && hold_gate) for (int c = 0; c < C; c++) gate[c] <= word0[c];
    silu_valid <= {silu_valid[3:0], silu_start && !rst};
    silu_index[0] <= four ? {1'b0, ready_unit} : {2'b0, ready_unit[19:1]};
    for (int i = 1; i < 5; i++) silu_index[i] <= silu_index[i-1];
    add1 <= results && mode == MODE_ADD && !rst;
    add_index1 <= index;
    add_pair1 <= four;
    for (int c = 0; c < C; c++) begin
      add_word0[c] <= word0[c];
      add_word1[c] <= word1[c];
    end
  end

  // ---- logits
  logic [31:0] best_word[0:C-1];
  assign logit_valid = results && mode == MODE_LOGITS;
  assign logit_pair = four;
  assign logit_index = {11'b0, index};
  always_comb for (int c = 0; c < C; c++) logits[c*64+:64] = {word1[c], word0[c]};
  always_ff @(posedge clk)
    if (logit_valid)
      for (int c = 0; c < C; c++) begin
        if (index == 0 || word0[c] > $signed(best_word[c])) begin
          best_word[c] <= word0[c];
          best[c*32+:32] <= {11'b0, index};
        end
        if (four && word1[c] > word0[c] && (index == 0 || word1[c] > $signed(best_word[c]))) begin
          best_word[c] <= word1[c];
          best[c*32+:32] <= {11'b0, index} + 32'd1;
        end
      end

  // ---- attention
  logic [7:0] head;
  logic [CB-1:0] token;
  logic [31:0] largest[0:C-1];
  logic [C-1:0] divide_done;
  logic divide_start;
  logic [BITS-1:0] beat2, beat3, beat4;
  logic [31:0] scale1_v;
  logic value1;
  assign value1 = take1 && values;
  assign scale1_v = scale1;
  logic [DRAIN*48-1:0] drains[0:C-1];
  logic [15:0] inverses[0:C-1];
  logic [5:0] excesses[0:C-1];
  logic [5:0] drain_index;
  always_ff @(posedge clk) begin
    if (value1) beat2 <= beat1;
    beat3 <= beat2;
    beat4 <= beat3;
  end
  for (genvar c = 0; c < C; c++) begin : g_attend
    logic [31:0] scores[0:(1<<CONTEXT_LOG2)-1];
    logic signed [31:0] score1;
    logic [31:0] total;
    logic [5:0] digits, excess;
    logic [15:0] denominator;
    always_ff @(posedge clk) begin
      if (take && values && use_column[c]) score1 <= scores[unit[CONTEXT_LOG2-1:0]];
      if (keys && ready[c]) begin
        scores[ready_unit[CONTEXT_LOG2-1:0]] <= word0[c];
        if (ready_unit == 0 || word0[c] > $signed(largest[c])) largest[c] <= word0[c];
      end
    end
    weighted_sum #(
        .KW(KW)
    ) sums (
        .clk, .valid(value1 && use_column[c]), .first_token(first_unit1), .chunk(chunk1[1:0]), .score(score1),
        .largest(largest[c]), .scale(scale1_v[15:0]), .codes4(beat4), .total, .drain_index, .drain(drains[c])
    );
    always_comb begin
      digits = '0;
      for (int i = 0; i < 32; i++) if (total[i]) digits = 6'(i + 1);
    end
    assign excess = digits - 6'd16;
    assign denominator = 16'(total >> excess);
    assign excesses[c] = excess;
    divide divider (
        .clk, .rst, .start(divide_start), .numerator(code_factor), .denominator, .done(divide_done[c]),
        .quotient(inverses[c])
    );
  end
  // what was read, DRAIN words a cycle: product, then rounded
  logic [7:0] in_group;
  logic [CB-1:0] from;
  assign from = CB'(in_group);
  logic draining, drain1, drain2;
  logic [5:0] drain_at1, drain_at2;
  logic [7:0] in_group1, in_group2;
  logic signed [63:0] drain_product[0:DRAIN-1];
  logic signed [63:0] drain_rounded;
  logic [5:0] drain_shift;
  logic [DRAIN*32-1:0] drain_words;
  assign draining = state == READ_OUT && in_group != group_heads;
  always_ff @(posedge clk) begin
    drain1 <= draining && !rst;
    drain_at1 <= drain_index;
    in_group1 <= in_group;
    drain_shift <= 6'd20 + excesses[from];
    for (int i = 0; i < DRAIN; i++)
      drain_product[i] <= $signed(drains[from][i*48+:48]) * $signed({1'b0, inverses[from]});
    drain2 <= drain1 && !rst;
    drain_at2 <= drain_at1;
    in_group2 <= in_group1;
    for (int i = 0; i < DRAIN; i++) begin
      drain_rounded = (drain_product[i] + (64'sd1 <<< (drain_shift - 6'd1))) >>> drain_shift;
      if (drain_rounded > 64'sd67108863) drain_rounded = 64'sd67108863;
      if (drain_rounded < -64'sd67108864) drain_rounded = -64'sd67108864;
      drain_words[i*32+:32] <= drain_rounded[31:0];
    end
  end

  // ---- ports of the vector memory
  logic [15:0] drain_word;
  assign drain_word = 16'((head * group_heads + in_group2) * {5'b0, head_chunks}) * 16'(KW) + 16'(drain_at2) * 16'(DRAIN);
  always_comb begin
    read = vector_read || (results && mode == MODE_ADD);
    read_row = vector_read ? vector_read_row : target + ROWS_LOG2'(index >> VLB);
    write = 1'b0;
    write_columns = active;
    write_row = '0;
    write_mask = '1;
    write_pairs = 1'b0;
    write_single = 1'b0;
    write_words = vector_words;
    for (int c = 0; c < C; c++) begin
      write_word0[c] = word0[c];
      write_word1[c] = word1[c];
    end
    if (vector_write) begin
      write = 1'b1;
      write_columns = C'(1) << vector_write_column;
      write_row = vector_write_row;
    end else if (state == EMBED) begin
      write = fifo_valid;
      write_columns = C'(1) << load_token;
      write_row = now[40+:ROWS_LOG2] + load_row;
      for (int w = 0; w < VL; w++) write_words[w*32+:32] = {{16{beat[w*16+15]}}, beat[w*16+:16]} << now[51:48];
    end else if (drain2) begin
      write = 1'b1;
      write_columns = C'(1) << token;
      write_row = now[40+:ROWS_LOG2] + ROWS_LOG2'(drain_word >> VLB);
      write_mask = '0;
      for (int i = 0; i < VL / DRAIN; i++)
        if (VLB'(i * DRAIN) == drain_word[VLB-1:0]) write_mask[i*DRAIN+:DRAIN] = '1;
      write_words = {(VL / DRAIN) {drain_words}};
    end else if (silu_valid[3]) begin
      write = 1'b1;
      write_row = target + ROWS_LOG2'(silu_index[3] >> VLB);
      write_mask = VL'(1) << silu_index[3][VLB-1:0];
      write_single = 1'b1;
      for (int c = 0; c < C; c++) write_word0[c] = silu_word[c];
    end else if (add1) begin
      write = 1'b1;
      write_row = target + ROWS_LOG2'(add_index1 >> VLB);
      write_mask = VL'(add_pair1 ? 3 : 1) << add_index1[VLB-1:0];
      write_pairs = add_pair1;
      write_single = !add_pair1;
      for (int c = 0; c < C; c++) begin
        write_word0[c] = limit(sum0[c]);
        write_word1[c] = limit(sum1[c]);
      end
    end else if (results && mode == MODE_STORE) begin
      write = 1'b1;
      write_row = target + ROWS_LOG2'(index >> VLB);
      write_mask = VL'(four ? 3 : 1) << index[VLB-1:0];
      write_pairs = four;
      write_single = !four;
    end
  end
  assign pop = consuming || vector_pop || ((state == EMBED || state == TURNS) && fifo_valid);

  // ---- sequencer
  logic [4:0] settle;  // cycles after the last beat until its result is stored
  logic fence_wait;
  assign fence_open = (state == FENCE || keys || values || state == DIVIDE || state == READ_OUT) && stores_open == 0;
  logic last_token;
  assign last_token = {1'b0, token} + 1'b1 == count;
  always_ff @(posedge clk) begin
    done <= 1'b0;
    vector_start <= 1'b0;
    walk_start <= 1'b0;
    divide_start <= 1'b0;
    stores_open <= stores_open + 16'(store && store_ready) - 16'(store_done);
    case (state)
      IDLE:
      if (start) begin
        pc <= '0;
        state <= LOAD;
      end
      LOAD: state <= DECODE;
      DECODE: begin
        now <= instruction;
        load_token <= '0;
        load_row <= '0;
        token <= '0;
        head <= '0;
        settle <= '0;
        state <= NEXT;
        case (instruction[63:60])
          OP_END: begin
            done <= 1'b1;
            state <= IDLE;
          end
          OP_SET:
          case (instruction[59:56])
            SET_HEADS: begin
              head_chunks <= instruction[2:0];
              block_beats <= instruction[15:8];
              query_heads <= instruction[23:16];
              kv_heads <= instruction[31:24];
              group_heads <= instruction[39:32];
              scratch <= instruction[40+:ROWS_LOG2];
            end
            SET_HEAD_STRIDE: head_stride <= instruction[31:0];
            SET_VALUE_OFFSET: value_offset <= instruction[31:0];
            SET_EPSILON: epsilon <= instruction[31:0];
            SET_FACTORS: begin
              code_factor <= instruction[15:0];
              norm_factor <= instruction[31:16];
              score_factor <= instruction[47:32];
              score_shift <= instruction[55:48];
            end
            default: ;
          endcase
          OP_MODE: begin
            target <= instruction[28+:ROWS_LOG2];
            mode_shift <= instruction[47:40];
            mode <= instruction[51:48];
            four_bits <= instruction[52];
          end
          OP_EMBED: state <= EMBED;
          OP_TURNS: state <= TURNS;
          OP_NORM, OP_CODES, OP_HEADS: begin
            vector_start <= 1'b1;
            state <= VECTOR;
          end
          OP_GEMV: begin
            walk_start <= 1'b1;
            units <= instruction[51:32];
            chunks <= {2'b0, instruction[57:52]};
            scale_period <= four_bits ? 8'(KW / 4) : 8'(KW / 2);
            activation_base <= '0;
            for (int c = 0; c < C; c++) begin
              use_mantissa[c] <= token_mantissa[c];
              use_shift[c] <= 6'(token_shift[c] + 8'(mode_shift));
            end
            state <= GEMV;
          end
          OP_ATTEND: state <= FENCE;
          default: ;
        endcase
      end
      EMBED, TURNS:
      if (fifo_valid) begin
        load_row <= load_row + 1'b1;
        if (load_row + 1'b1 == (state == EMBED ? now[32+:ROWS_LOG2] : ROWS_LOG2'({head_chunks, 1'b0}))) begin
          load_row <= '0;
          load_token <= load_token + 1'b1;
          if ({1'b0, load_token} + 1'b1 == count) state <= NEXT;
        end
      end
      VECTOR: if (vector_done) state <= NEXT;
      GEMV: begin
        settle <= (walk_start || walking) ? '0 : settle + 1'b1;
        if (settle == 5'd25) state <= NEXT;
      end
      FENCE:
      if (stores_open == 0) begin
        walk_start <= 1'b1;
        units <= 20'(position) + 20'(token) + 20'd1;
        chunks <= {5'b0, head_chunks};
        scale_period <= block_beats;
        activation_base <= CODES_LOG2'((8'(token) * kv_heads + head) * 8'(head_chunks));
        for (int c = 0; c < C; c++) begin
          use_mantissa[c] <= query_mantissa[{token, HEADS_LOG2'(head * group_heads + 8'(c))}];
          use_shift[c] <= 6'(query_shift[{token, HEADS_LOG2'(head * group_heads + 8'(c))}] + 8'(score_shift));
        end
        settle <= '0;
        state <= KEYS;
      end
      KEYS: begin
        settle <= (walk_start || walking) ? '0 : settle + 1'b1;
        if (settle == 5'd19) begin
          walk_start <= 1'b1;
          settle <= '0;
          state <= VALUES;
        end
      end
      VALUES: begin
        settle <= (walk_start || walking) ? '0 : settle + 1'b1;
        if (settle == 5'd5) begin
          divide_start <= 1'b1;
          state <= DIVIDE;
        end
        in_group <= '0;
        drain_index <= '0;
      end
      DIVIDE: if (divide_done[0]) state <= READ_OUT;
      READ_OUT: begin
        drain_index <= drain_index + 6'd1;
        if (drain_index + 6'd1 == 6'({head_chunks, 4'b0})) begin
          drain_index <= '0;
          in_group <= in_group + 8'd1;
        end
        if (!draining && !drain1) begin
          token <= last_token ? '0 : token + 1'b1;
          head <= last_token ? head + 8'd1 : head;
          state <= last_token && head + 8'd1 == kv_heads ? NEXT : FENCE;
        end
      end
      NEXT: begin
        pc <= pc + 1'b1;
        state <= LOAD;
      end
      default: state <= IDLE;
    endcase
    if (rst) begin
      state <= IDLE;
      stores_open <= '0;
    end
  end
endmodule
