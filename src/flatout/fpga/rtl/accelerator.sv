// The whole accelerator: fetch -> beat FIFO -> walker -> columns -> results or attention -> vector memory, with the
// vector unit and the sequencer beside it.
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
    parameter int GROUP = 4,  // query heads that share a key head, at most C
    parameter int HEAD_CHUNKS = 4,  // of a head
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
    output logic [PC-1:0] running_pc,
    output logic consuming
);
`include "isa.svh"
  localparam int DOT = 12;
  localparam int VLB = $clog2(VL);
  localparam int DOT_BITS = 15 + $clog2(KW);  // of KW products of codes in [-127, 127]
  localparam int DRAIN = KW < 16 ? 1 : KW / 16;

  // ---- sequencer
  logic [PC-1:0] fetch_pc;
  logic [63:0] fetched, now;
  logic [2:0] head_chunks;
  logic [7:0] block_beats, kv_heads, query_heads, group_heads, score_shift, mode_shift, chunks, scale_period;
  logic [31:0] head_stride, value_offset, epsilon;
  logic [15:0] code_factor, norm_factor, score_factor;
  logic [ROWS_LOG2-1:0] scratch, target, load_row;
  logic [3:0] mode;
  logic [19:0] units;
  logic [CODES_LOG2-1:0] activation_base;
  logic [CB-1:0] token, load_token;
  logic [HEADS_LOG2-1:0] first_query;
  logic [10:0] first_chunk;
  logic four_bits, embed, turns, vector_start, vector_done, walk_start, walking, linear, keys, values, finish;
  logic drained, stores_open, fence_open, fifo_valid;
  logic [15:0] stores;
  always_ff @(posedge clk) stores <= rst ? '0 : stores + 16'(store && store_ready) - 16'(store_done);
  assign stores_open = stores != 0;
  sequencer #(
      .KW(KW), .C(C), .CB(CB), .PC(PC), .ROWS_LOG2(ROWS_LOG2), .CODES_LOG2(CODES_LOG2), .HEADS_LOG2(HEADS_LOG2)
  ) sequence_ (
      .clk, .rst, .program_write, .program_address, .program_data, .fetch_pc, .fetched, .start, .count, .position, .done,
      .pc(running_pc), .now, .head_chunks, .block_beats, .kv_heads, .query_heads, .group_heads, .head_stride,
      .value_offset, .epsilon, .code_factor, .norm_factor, .score_factor, .score_shift, .scratch, .mode, .four_bits,
      .mode_shift, .target, .beat_valid(fifo_valid), .embed, .turns, .load_token, .load_row, .vector_start, .vector_done,
      .walk_start, .walking, .units, .chunks, .scale_period, .linear, .keys, .values, .activation_base, .token,
      .first_query, .first_chunk, .finish, .drained, .stores_open, .fence_open
  );

  // ---- fetch
  logic pop, vector_pop, walker_pop;
  logic [BITS-1:0] beat;
  fetch #(
      .C(C), .CB(CB), .PC(PC), .FIFO_LOG2(FIFO_LOG2), .BURST_LOG2(BURST_LOG2)
  ) fetcher (
      .clk, .rst, .start, .count, .tokens, .position, .block, .offset,
      .pc(fetch_pc), .instruction(fetched), .fence_open, .fence_pc(running_pc),
      .request, .request_ready, .address(request_address), .beats(request_beats), .popped(pop)
  );
  beat_fifo #(
      .WIDTH(BITS), .DEPTH_LOG2(FIFO_LOG2)
  ) fifo (
      .clk, .rst, .push(beat_valid), .in(beat_data), .valid(fifo_valid), .pop, .out(beat)
  );
  assign pop = walker_pop || vector_pop || ((embed || turns) && fifo_valid);
  assign consuming = walker_pop;

  // ---- walker
  logic take, take1, first1, last1, first_unit1;
  logic [19:0] unit, unit1;
  logic [7:0] chunk, chunk1;
  logic [31:0] scale1;
  logic [BITS-1:0] beat1;
  logic four;
  assign four = linear && four_bits;
  walker #(
      .KW(KW)
  ) walk (
      .clk, .rst, .start(walk_start), .units, .chunks, .scale_period, .four_bits(four), .walking,
      .beat_valid(fifo_valid), .beat, .pop(walker_pop), .take, .unit, .chunk, .take1, .first1, .last1, .first_unit1,
      .unit1, .chunk1, .scale1, .beat1
  );
  // 4-bit codes: the first row in the low half of the beat, the second in the high half
  logic [BITS-1:0] low1, high1;
  always_comb begin
    low1 = beat1;
    high1 = '0;
    if (four)
      for (int i = 0; i < KW; i++) begin
        low1[i*8+:8] = {{4{beat1[i*4+3]}}, beat1[i*4+:4]};
        high1[i*8+:8] = {{4{beat1[BITS/2+i*4+3]}}, beat1[BITS/2+i*4+:4]};
      end
  end

  // ---- vector unit, with the table of turns
  logic vector_read, vector_write, code_write, code_half, spread_write, scale_write, query_write;
  logic [ROWS_LOG2-1:0] vector_read_row, vector_write_row;
  logic [CB-1:0] vector_read_column, vector_column1, vector_write_column, code_column, turn_column, scale_column;
  logic [VL*32-1:0] vector_row, vector_words;
  logic [7:0] code_row, spread_chunk, scale_head;
  logic [VL*8-1:0] codes;
  logic [3:0] turn_row;
  logic [BITS-1:0] turn;
  logic [1:0] spread;
  logic [15:0] scale_mantissa;
  logic signed [7:0] scale_shift;
  ram #(
      .WIDTH(BITS), .DEPTH_LOG2(CB + 3)
  ) turn_table (
      .clk, .read(1'b1), .read_address({turn_column, turn_row[2:0]}), .out(turn),
      .write(turns && fifo_valid), .write_address({load_token, load_row[2:0]}),
`ifdef PROBE
      .probe_address('0), .probe(),
`endif
      .in(beat)
  );
  always_ff @(posedge clk) vector_column1 <= vector_read_column;
  vector #(
      .KW(KW), .C(C), .CB(CB), .ROWS_LOG2(ROWS_LOG2)
  ) vectors (
      .clk, .rst, .start(vector_start), .op(now[63:60] == OP_NORM ? 2'd0 : now[63:60] == OP_CODES ? 2'd1 : 2'd2), .count,
      .source(now[40+:ROWS_LOG2]), .rows(now[32+:ROWS_LOG2]), .scratch, .gamma_shift(now[53:48]), .epsilon,
      .factor(now[63:60] == OP_NORM ? norm_factor : code_factor), .score_factor, .head_chunks, .query_heads, .kv_heads,
      .group_heads, .cache(now[31:0]), .head_stride, .value_offset, .block_beats, .block, .offset,
      .done(vector_done), .beat_valid(fifo_valid), .beat, .beat_pop(vector_pop),
      .turn_row, .turn_column, .turn,
      .read(vector_read), .read_row(vector_read_row), .read_column(vector_read_column), .row(vector_row),
      .write(vector_write), .write_row(vector_write_row), .write_column(vector_write_column),
      .write_words(vector_words),
      .code_write, .code_column, .code_row, .code_half, .codes, .spread_write, .spread_chunk, .spread,
      .scale_write, .query_write, .scale_column, .scale_head, .scale_mantissa, .scale_shift,
      .store, .store_ready, .store_address, .store_strobe, .store_data
  );

  // ---- columns: codes, multipliers and sums of each; what belongs to a chunk travels beside its sums
  logic [C-1:0] active, group_mask, use_column, ready;
  logic narrow, dot_take, tag_valid, tag_first, tag_last;
  logic [C*32-1:0] word0, word1;
  localparam int TAG = 1 + 1 + 1 + 20 + 32;
  logic [TAG-1:0] tag1;
  logic [DOT*TAG-1:0] tags;
  logic [19:0] tag_unit, ready_unit;
  logic [31:0] tag_scale;
  logic [8*20-1:0] ready_units;
  always_comb for (int c = 0; c < C; c++) active[c] = (CB + 1)'(c) < count;
  always_ff @(posedge clk) begin
    group_mask <= C'((1 << group_heads) - 1);
    narrow <= keys || mode != MODE_ADD;
  end
  assign use_column = keys || values ? group_mask : active;
  assign dot_take = take1 && !values;
  assign tag1 = {dot_take && !rst, first1, last1, unit1, scale1};
  always_ff @(posedge clk) begin
    tags <= {tags[(DOT-1)*TAG-1:0], tag1};
    ready_units <= {ready_units[7*20-1:0], tag_unit};
  end
  assign {tag_valid, tag_first, tag_last, tag_unit, tag_scale} = tags[(DOT-1)*TAG+:TAG];
  assign ready_unit = ready_units[7*20+:20];
  for (genvar c = 0; c < C; c++) begin : g_column
    logic [BITS-1:0] activation;
    ram #(
        .WIDTH(BITS / 2), .DEPTH_LOG2(CODES_LOG2)
    ) codes_low (
        .clk, .read(take), .read_address(activation_base + CODES_LOG2'(chunk)), .out(activation[BITS/2-1:0]),
        .write(code_write && code_column == CB'(c) && !code_half), .write_address(code_row[CODES_LOG2-1:0]),
`ifdef PROBE
        .probe_address('0), .probe(),
`endif
        .in(codes)
    );
    ram #(
        .WIDTH(BITS / 2), .DEPTH_LOG2(CODES_LOG2)
    ) codes_high (
        .clk, .read(take), .read_address(activation_base + CODES_LOG2'(chunk)), .out(activation[BITS-1:BITS/2]),
        .write(code_write && code_column == CB'(c) && code_half), .write_address(code_row[CODES_LOG2-1:0]),
`ifdef PROBE
        .probe_address('0), .probe(),
`endif
        .in(codes)
    );
    // multipliers of the token, and of each query head of each token; spreads of the token's chunks
    logic [15:0] token_mantissa, mantissa;
    logic signed [7:0] token_shift;
    logic [23:0] queries[0:(1<<(CB+HEADS_LOG2))-1], query;
    logic [5:0] shift;
    logic [1:0] spreads[0:63];
    logic [DOT*2-1:0] spread_tags;
    always_ff @(posedge clk) begin
      if (scale_write && scale_column == CB'(c)) {token_shift, token_mantissa} <= {scale_shift, scale_mantissa};
      if (query_write) queries[{scale_column, scale_head[HEADS_LOG2-1:0]}] <= {scale_shift, scale_mantissa};
      if (spread_write && scale_column == CB'(c)) spreads[spread_chunk[5:0]] <= spread;
      query <= queries[{token, first_query + HEADS_LOG2'(c)}];
      mantissa <= linear ? token_mantissa : query[15:0];
      shift <= linear ? 6'(token_shift + 8'(mode_shift)) : 6'(query[23:16] + score_shift);
      spread_tags <= {spread_tags[(DOT-1)*2-1:0], keys ? 2'd3 : spreads[chunk1[5:0]]};
    end
    logic signed [21:0] dot0, dot1;
    dot_pair #(
        .KW(KW), .LATENCY(DOT)
    ) dots (
        .clk, .enable(dot_take && use_column[c]), .low(low1), .high(high1), .activation,
        .low_sum(dot0), .high_sum(dot1)
    );
    column #(
        .DOT_BITS(DOT_BITS)
    ) columns (
        .clk, .valid(tag_valid && use_column[c]), .first(tag_first), .last(tag_last),
        .narrow, .dot0(dot0[DOT_BITS-1:0]), .dot1(dot1[DOT_BITS-1:0]), .scale0(tag_scale[15:0]), .scale1(tag_scale[31:16]),
        .spread(spread_tags[(DOT-1)*2+:2]), .mantissa, .shift, .ready(ready[c]),
        .word0(word0[c*32+:32]), .word1(word1[c*32+:32])
    );
  end

  // ---- results and attention
  logic result_read, result_write, attention_write;
  logic [ROWS_LOG2-1:0] result_read_row, result_row;
  logic [VL-1:0] result_mask;
  logic [C*32-1:0] result_word0, result_word1;
  logic [C*VL*32-1:0] rows;
  logic [15:0] attention_at;
  logic [DRAIN*32-1:0] attention_words;
  results #(
      .C(C), .VL(VL), .ROWS_LOG2(ROWS_LOG2)
  ) result (
      .clk, .rst, .mode, .four_bits, .target, .ready(ready[0] && linear), .unit(ready_unit), .word0, .word1,
      .read(result_read), .read_row(result_read_row), .row(rows),
      .write(result_write), .write_row(result_row), .write_mask(result_mask), .write_word0(result_word0),
      .write_word1(result_word1), .logit_valid, .logit_index, .best
  );
  assign logit_pair = four_bits;
  always_comb for (int c = 0; c < C; c++) logits[c*64+:64] = {word1[c*32+:32], word0[c*32+:32]};
  attention #(
      .KW(KW), .C(GROUP), .HEAD_CHUNKS(HEAD_CHUNKS), .CONTEXT_LOG2(CONTEXT_LOG2)
  ) attend (
      .clk, .rst, .use_column(use_column[GROUP-1:0]), .keys, .ready(ready[GROUP-1:0]), .ready_unit,
      .word(word0[GROUP*32-1:0]), .values, .take, .unit, .take1, .first_unit1,
      .chunk1(chunk1[1:0]), .scale1(scale1[15:0]), .beat1, .finish, .code_factor, .head_chunks, .group_heads, .drained,
      .write(attention_write), .write_at(attention_at), .write_words(attention_words)
  );

  // ---- vector memory: one bank for each word of a row. What is written passes through a register first.
  logic [BITS-1:0] embed_beat;
  logic embed1;
  logic [CB-1:0] embed_token;
  logic [ROWS_LOG2-1:0] embed_row;
  logic [15:0] attention_word;
  logic [C-1:0] write_columns, write_columns1;
  logic [ROWS_LOG2-1:0] write_row, write_row1;
  logic [VL-1:0] write_mask, write_mask1;
  logic [VL*32-1:0] write_words, write_words1;
  logic [C*32-1:0] result_word0_1, result_word1_1;
  logic from_results, from_results1;
  assign attention_word = ((16'(first_chunk) << $clog2(KW / DRAIN)) + attention_at) * 16'(DRAIN);
  always_comb begin
    write_columns = '0;
    write_row = vector_write_row;
    write_mask = '1;
    write_words = vector_words;
    from_results = 1'b0;
    if (vector_write) write_columns = C'(1) << vector_write_column;
    else if (embed1) begin
      write_columns = C'(1) << embed_token;
      write_row = now[40+:ROWS_LOG2] + embed_row;
      for (int w = 0; w < VL; w++)
        write_words[w*32+:32] = {{16{embed_beat[w*16+15]}}, embed_beat[w*16+:16]} << now[51:48];
    end else if (attention_write) begin
      write_columns = C'(1) << token;
      write_row = now[40+:ROWS_LOG2] + ROWS_LOG2'(attention_word >> VLB);
      for (int i = 0; i < VL / DRAIN; i++)
        write_mask[i*DRAIN+:DRAIN] = {DRAIN{VLB'(i * DRAIN) == attention_word[VLB-1:0]}};
      write_words = {(VL / DRAIN) {attention_words}};
    end else if (result_write) begin
      write_columns = active;
      write_row = result_row;
      write_mask = result_mask;
      from_results = 1'b1;
    end
  end
  always_ff @(posedge clk) begin
    embed1 <= embed && fifo_valid && !rst;
    embed_beat <= beat;
    embed_token <= load_token;
    embed_row <= load_row;
    write_columns1 <= rst ? '0 : write_columns;
    from_results1 <= from_results;
    write_row1 <= write_row;
    write_mask1 <= write_mask;
    {result_word1_1, result_word0_1} <= {result_word1, result_word0};
    write_words1 <= write_words;
  end
  logic read_rows;
  logic [ROWS_LOG2-1:0] read_row;
  assign read_rows = vector_read || result_read;
  assign read_row = vector_read ? vector_read_row : result_read_row;
  for (genvar c = 0; c < C; c++) begin : g_memory
    for (genvar w = 0; w < VL; w++) begin : g_bank
      ram #(
          .WIDTH(32), .DEPTH_LOG2(ROWS_LOG2)
      ) bank (
          .clk, .read(read_rows), .read_address(read_row), .out(rows[(c*VL+w)*32+:32]),
          .write(write_columns1[c] && write_mask1[w]), .write_address(write_row1),
`ifdef PROBE
          .probe_address(probe_row), .probe(probe_words[(c*VL+w)*32+:32]),
`endif
          .in(!from_results1 ? write_words1[w*32+:32] : w % 2 == 1 ? result_word1_1[c*32+:32] : result_word0_1[c*32+:32])
      );
    end
  end
  always_comb begin
    vector_row = rows[VL*32-1:0];
    for (int c = 1; c < C; c++) if (vector_column1 == CB'(c)) vector_row = rows[c*VL*32+:VL*32];
  end
endmodule
