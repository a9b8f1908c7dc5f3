// The integer vector unit: norms, rounding to codes, rotary embedding, keys and values.
//
// VL lanes (vector_lane.sv). Rows of VL words are read from the vector memory of one token at a time:
//   pass 1  multiply by the norm's weights, turn pairs, or just look; note the largest of the row's chunk
//   fit     mantissa, exponent and reciprocal of the largest; root of the mean square for norms
//   pass 2  multiply by the reciprocal, round to codes, write them to the activation memory or as a key or value
// A row is in stage s, s cycles after it was asked for: 1 read, 2 multiply, ... 8 rounded, END its largest is known.
module vector #(
    parameter int KW = 64,
    parameter int C = 4,
    parameter int CB = 2,  // bits of a column's number
    parameter int CHUNKS = 64,  // chunks of codes that keep their own spread
    parameter int ROWS_LOG2 = 8,
    parameter int VL = KW / 2
) (
    input logic clk,
    input logic rst,
    // command
    input logic start,
    input logic [1:0] op,  // 0 norm, 1 codes only, 2 heads
    input logic [CB:0] count,  // tokens
    input logic [ROWS_LOG2-1:0] source,
    input logic [ROWS_LOG2-1:0] rows,
    input logic [ROWS_LOG2-1:0] scratch,
    input logic [5:0] gamma_shift,
    input logic [31:0] epsilon,
    input logic [15:0] factor,  // of norms or codes
    input logic [15:0] score_factor,
    input logic [2:0] head_chunks,
    input logic [7:0] query_heads,
    input logic [7:0] kv_heads,
    input logic [7:0] group_heads,  // query heads that share a key head
    input logic [31:0] cache,  // address of the layer's keys
    input logic [31:0] head_stride,
    input logic [31:0] value_offset,
    input logic [7:0] block_beats,  // data beats of a block
    input logic [C*24-1:0] block,  // of each token: the block of its keys
    input logic [C*8-1:0] offset,  // and its place there
    output logic done,
    // weights of norms
    input logic beat_valid,
    input logic [KW*8-1:0] beat,
    output logic beat_pop,
    // cos and sin
    output logic [3:0] turn_row,
    output logic [CB-1:0] turn_column,
    input logic [KW*8-1:0] turn,  // a cycle later
    // vector memory
    output logic read,
    output logic [ROWS_LOG2-1:0] read_row,
    output logic [CB-1:0] read_column,
    input logic [VL*32-1:0] row,  // a cycle later
    output logic write,
    output logic [ROWS_LOG2-1:0] write_row,
    output logic [CB-1:0] write_column,
    output logic [VL*32-1:0] write_words,
    // codes
    output logic code_write,
    output logic [CB-1:0] code_column,
    output logic [7:0] code_row,
    output logic code_half,
    output logic [VL*8-1:0] codes,
    output logic spread_write,
    output logic [7:0] spread_chunk,
    output logic [1:0] spread,
    // multipliers
    output logic scale_write,
    output logic query_write,  // of a query head instead of a token
    output logic [CB-1:0] scale_column,
    output logic [7:0] scale_head,
    output logic [15:0] scale_mantissa,
    output logic signed [7:0] scale_shift,
    // keys and values
    output logic store,
    input logic store_ready,
    output logic [31:0] store_address,
    output logic [KW-1:0] store_strobe,
    output logic [KW*8-1:0] store_data
);
  localparam logic [1:0] NORM = 0, CODES = 1, HEADS = 2;
  localparam int LEVELS = $clog2(VL);
  localparam int END = 9 + LEVELS;
  typedef enum logic [3:0] {
    IDLE, PASS1, DRAIN1, FIT, DIVIDE, PASS2, DRAIN2, STORE, STORE_SCALE, NEXT
  } state_t;
  state_t state;
  logic busy, norm_pass;  // not idle; in pass 1 of a norm, which takes its weights from the FIFO

  logic [1:0] kind;
  logic [CB-1:0] token;
  logic [CB:0] last_token;
  logic [ROWS_LOG2-1:0] at;
  logic part;
  logic [4:0] waited;
  logic [7:0] head, query_group, query_in_group;
  logic [ROWS_LOG2-1:0] head_row;
  // What the head is, and the next one: in registers, because much hangs on it. After the heads of a token: the first.
  logic is_query, is_key, is_value, next_is_query, next_is_key, last_head, turned, group_ends;
  always_ff @(posedge clk) begin
    group_ends <= query_in_group + 8'd1 == group_heads;
    next_is_query <= head + 8'd1 < query_heads;
    next_is_key <= head + 8'd1 >= query_heads && head + 8'd1 < query_heads + kv_heads;
    last_head <= head + 8'd1 == query_heads + {kv_heads[6:0], 1'b0};
  end
  logic [ROWS_LOG2-1:0] length, length_less2, half_rows, half_less1, base;
  logic heads_next, at_last;  // at_last: `at` is the last of `length` rows, 2 at least
  assign half_rows = {{(ROWS_LOG2 - 3) {1'b0}}, head_chunks};
  assign heads_next = (busy ? kind : op) == HEADS;
  always_ff @(posedge clk) begin
    length <= heads_next ? {half_rows[ROWS_LOG2-2:0], 1'b0} : rows;
    length_less2 <= (heads_next ? {half_rows[ROWS_LOG2-2:0], 1'b0} : rows) - ROWS_LOG2'(2);
    half_less1 <= half_rows - 1'b1;
  end
  assign base = busy && kind == HEADS ? head_row : source;

  // ---- stage 0: which row, and what it is multiplied by
  logic issue, pass2, step, wraps;
  assign pass2 = state == PASS2;
  assign issue = (state == PASS1 && (!norm_pass || beat_valid)) || pass2;
  assign step = pass2 || (issue && (kind == NORM ? {1'b0, token} == last_token : !turned || part));
  assign wraps = at == half_less1;
  // The row of the source, of the scratch, and of the first and second half that are turned into each other, with their
  // cos and sin: registers, because the memory wants them early.
  logic [ROWS_LOG2-1:0] first_row, first_high, source_row, scratch_row, low_row, high_row;
  logic [3:0] low_turn, high_turn;
  logic second;
  always_ff @(posedge clk) begin
    first_row <= base;
    first_high <= base + half_rows;
    if (state != PASS1 && !pass2) begin
      source_row <= first_row;
      scratch_row <= scratch;
      low_row <= first_row;
      high_row <= first_high;
      low_turn <= '0;
      high_turn <= {1'b0, head_chunks};
      second <= 1'b0;
    end else if (step) begin
      source_row <= source_row + 1'b1;
      scratch_row <= scratch_row + 1'b1;
      low_row <= wraps ? first_row : low_row + 1'b1;
      high_row <= wraps ? first_high : high_row + 1'b1;
      low_turn <= wraps ? '0 : low_turn + 1'b1;
      high_turn <= wraps ? {1'b0, head_chunks} : high_turn + 1'b1;
      second <= second || wraps;
    end
  end
  assign read = issue;
  assign read_column = token;
  assign read_row = pass2 ? (kind == NORM || turned ? scratch_row : source_row)
                  : turned ? (part ? high_row : low_row) : source_row;
  assign turn_column = token;
  // cos for the first of a first half and the second of a second half, sin for the others
  assign turn_row = (second ^ part) ? high_turn : low_turn;
  assign beat_pop = norm_pass && beat_valid && {1'b0, token} == last_token;

  // ---- what the stages know of their row
  localparam int CT = 6 + CB + ROWS_LOG2;
  logic [CT-1:0] control0;
  logic [END*CT-1:0] control;
  assign control0 = {issue && !(turned && !pass2 && !part), issue && turned && !pass2 && !part, pass2,
                     kind == NORM && !pass2, turned && !pass2, !second, token, at};
  always_ff @(posedge clk) control <= rst ? '0 : {control[(END-1)*CT-1:0], control0};
  logic pass2_1, norm1, turned1;
  logic [CB-1:0] token1;
  logic [ROWS_LOG2-1:0] at1;
  assign {pass2_1, norm1, turned1, token1, at1} = {control[CT-3-:3], control[CB+ROWS_LOG2-1:0]};
  logic whole3, pass2_3, norm3, turned3, keep4, turned4, minus4;
  logic [ROWS_LOG2-1:0] at3;
  assign {whole3, pass2_3, norm3, turned3} = {control[3*CT-1], control[3*CT-3-:3]};
  assign at3 = control[2*CT+:ROWS_LOG2];
  assign {keep4, turned4, minus4} = {control[4*CT-2], control[4*CT-5-:2]};
  logic whole7, pass2_7, turned7;
  assign {whole7, pass2_7, turned7} = {control[7*CT-1], control[7*CT-3], control[7*CT-5]};
  logic whole8, pass2_8;
  logic [CB-1:0] token8;
  logic [ROWS_LOG2-1:0] at8;
  assign {whole8, pass2_8, token8, at8} = {control[8*CT-1], control[8*CT-3], control[7*CT+:CB+ROWS_LOG2]};
  // Which rows are first is noted a cycle before it is needed.
  logic squares_valid, squares_first, end_valid, end_first;
  logic [CB-1:0] squares_token, end_token;
  logic [ROWS_LOG2-1:0] end_at;
  assign squares_valid = control[(END-4)*CT-1] && control[(END-4)*CT-4];
  assign squares_token = control[(END-5)*CT+ROWS_LOG2+:CB];
  assign end_valid = control[END*CT-1] && !control[END*CT-3];
  assign {end_token, end_at} = control[(END-1)*CT+:CB+ROWS_LOG2];
  always_ff @(posedge clk) begin
    squares_first <= control[(END-6)*CT+:ROWS_LOG2] == 0;
    end_first <= control[(END-2)*CT+:ROWS_LOG2] == 0;
  end

  // ---- lanes
  logic [KW*8-1:0] gamma1;
  logic [15:0] inverse;
  logic [VL*32-1:0] word2, word8;
  logic [VL*16-1:0] factor2;
  logic [VL*56-1:0] square5;
  logic [5:0] right4;  // of the lanes: shift - 1
  always_ff @(posedge clk) begin
    if (beat_valid && busy) gamma1 <= beat;
    if (busy) begin
      word2 <= row;
      for (int l = 0; l < VL; l++)
        factor2[l*16+:16] <= pass2_1 ? inverse : norm1 ? gamma1[l*16+:16] : turned1 ? turn[l*16+:16] : 16'd2;
    end
  end
  for (genvar l = 0; l < VL; l++) begin : g_lane
    vector_lane lane (
        .clk, .enable(busy), .word2(word2[l*32+:32]), .factor2(factor2[l*16+:16]), .keep4, .turned4, .minus4,
        .right4, .narrow7(turned7), .word8(word8[l*32+:32]), .square5(square5[l*56+:56])
    );
  end

  // ---- the largest of rows and chunks, and the sum of squares
  logic [31:0] end_largest;
  logic [55:0] squares;
  logic [31:0] largest[0:C-1];
  logic [63:0] square_sum[0:C-1];
  logic [31:0] even_row[0:C-1];  // a chunk is two rows
  (* ram_style = "distributed" *) logic [31:0] chunk_largest[0:C*CHUNKS-1];  // block RAM would come too late
  max_tree #(.N(VL)) largest_of_row (.clk, .enable(busy), .words(word8), .largest(end_largest));
  sum_tree #(.N(VL), .WIDTH(56)) squares_of_row (.clk, .enable(busy), .in(square5), .sum(squares));
  always_ff @(posedge clk) begin
    if (squares_valid)
      square_sum[squares_token] <= (squares_first ? 64'(epsilon) : square_sum[squares_token]) + 64'(squares);
    if (end_valid) begin
      if (end_first || largest[end_token] < end_largest) largest[end_token] <= end_largest;
      if (!end_at[0]) even_row[end_token] <= end_largest;
      else chunk_largest[{end_token, 6'(end_at>>1)}] <= even_row[end_token] < end_largest ? end_largest : even_row[end_token];
    end
  end

  // ---- the scale of what pass 1 has seen: each step from registers that have long been still
  logic [31:0] top1, less2, less5;
  logic [63:0] mean1;
  logic [6:0] top_digits2, top_digits3, mean_digits2, mean_digits3;
  logic [4:0] exponent4, exponent;
  logic [3:0] missing4;
  logic [12:0] mantissa;
  logic [11:0] full;
  logic signed [7:0] power, halvings;
  logic [5:0] places4;
  logic [45:0] near5;
  logic [31:0] fitted;
  logic [37:0] bound;  // the largest code stands for this
  logic [27:0] plain_product;
  logic [15:0] plain_factor;
  logic [15:0] root, quotient;
  logic root_start, root_done, divide_start, divide_done, root_ready, dividing_root;
  logic [15:0] numerator, denominator;
  leading_digits digits_of_top (.clk, .x({32'b0, top1}), .digits(top_digits2));
  leading_digits digits_of_mean (.clk, .x(mean1), .digits(mean_digits2));
  divide divider (.clk, .rst, .start(divide_start), .numerator, .denominator, .done(divide_done), .quotient);
  square_root rooter (.clk, .rst, .start(root_start), .square(fitted), .done(root_done), .root);
  always_ff @(posedge clk)
    if (busy) begin
      top1 <= largest[token] == 0 ? 32'd1 : largest[token];
      mean1 <= square_sum[token];
      less2 <= top1 - 32'd1;
      top_digits3 <= top_digits2;
      mean_digits3 <= mean_digits2;
      exponent4 <= top_digits3 > 12 ? 5'(top_digits3 - 7'd12) : 5'd0;
      missing4 <= top_digits3 < 12 ? 4'(7'd12 - top_digits3) : 4'd0;
      // Half of what is above 32 digits, rounded up; half of what is below, rounded down.
      halvings <= 8'(($signed({1'b0, mean_digits3}) - 8'sd31) >>> 1);
      less5 <= less2 >> exponent4;
      // mean1 * 2**(-2 * halvings), in a coarse step and a fine one
      places4 <= 6'((mean_digits3 + 7'd1) >> 1);
      near5 <= 46'({mean1, 32'b0} >> {places4[5:3], 4'b0});
      fitted <= 32'(near5 >> {places4[2:0], 1'b0});
      // The scale rounded up: what is one less, rounded down, plus one.
      mantissa <= less5 == 32'd4095 ? 13'd2048 : 13'(less5) + 13'd1;
      exponent <= exponent4 + 5'(less5 == 32'd4095);
      full <= 12'(mantissa << missing4);
      power <= 8'(exponent) - 8'(missing4);
      bound <= 38'(mantissa) << exponent;
      plain_factor <= kind == HEADS && is_query ? score_factor : factor;
      plain_product <= full * plain_factor;
    end

  // ---- how much larger the codes of quiet chunks are made
  logic [31:0] chunk2;
  logic [1:0] spread2, spread3;
  always_comb begin
    spread2 = 2'd0;
    if (!(bound < {5'b0, chunk2, 1'b0})) spread2 = 2'd1;  // `<` is one carry chain
    if (!(bound < {4'b0, chunk2, 2'b0})) spread2 = 2'd2;
    if (!(bound < {3'b0, chunk2, 3'b0})) spread2 = 2'd3;
    if (kind == HEADS) spread2 = 2'd0;
  end
  always_ff @(posedge clk) begin
    chunk2 <= chunk_largest[{token1, 6'(at1>>1)}];
    spread3 <= spread2;
    spread_write <= whole3 && pass2_3 && at3[0] && kind != HEADS;
    spread_chunk <= 8'(at3 >> 1);
    spread <= spread3;
  end

  always_ff @(posedge clk)
    right4 <= pass2_3 ? 6'(8'sd18 + power - 8'(spread3)) : norm3 ? gamma_shift - 6'd1 : turned3 ? 6'd13 : 6'd0;

  // ---- results; `kind` and the head have long been still
  always_ff @(posedge clk) begin
    write <= whole7 && !pass2_7 && (kind == NORM || turned);
    code_write <= whole7 && pass2_7 && (kind != HEADS || is_query);
  end
  assign write_row = scratch + at8;
  assign write_column = token8;
  assign write_words = word8;
  always_comb for (int l = 0; l < VL; l++) codes[l*8+:8] = word8[l*32+:8];
  logic [7:0] query_number, query_row, first_code;
  assign code_column = kind == HEADS ? CB'(query_in_group) : token8;
  assign code_row = first_code + 8'(at8 >> 1);
  assign code_half = at8[0];
  assign scale_head = head;

  // ---- where a key or value goes: each product from registers that have long been still
  logic [KW*8*4-1:0] line;  // codes of one key or value
  logic [2:0] stored;
  logic [7:0] key_number, value_number, kv_head, scale_first, scale_end;
  logic [8:0] block_size;
  logic [23:0] block_number;
  logic [31:0] region1, stride3, block3, start4, block_start, line_start;
  logic [23:0] stride_low2, stride_high2, block_low2, block_high2;
  always_ff @(posedge clk)
    if (busy) begin
      query_number <= 8'(8'(token) * kv_heads) + query_group;
      query_row <= 8'(query_number * head_chunks);
      first_code <= kind == HEADS ? query_row : 8'd0;
      scale_first <= 8'(offset[token*8+:8] * head_chunks);
      scale_end <= scale_first + 8'(head_chunks);
      key_number <= head - query_heads;
      value_number <= key_number - kv_heads;
      kv_head <= is_key ? key_number : value_number;
      block_size <= {1'b0, block_beats} + 9'd1;
      block_number <= block[token*24+:24];
      stride_low2 <= kv_head * head_stride[15:0];
      stride_high2 <= kv_head * head_stride[31:16];
      block_low2 <= block_number[11:0] * block_size;
      block_high2 <= block_number[23:12] * block_size;
      stride3 <= 32'(stride_low2) + {stride_high2[15:0], 16'b0};
      block3 <= 32'(block_low2) + {block_high2[19:0], 12'b0};
      region1 <= cache + (is_value ? value_offset : 32'd0);
      start4 <= stride3 + block3;
      block_start <= start4 + region1;
      line_start <= block_start + 32'(scale_first) + 32'd1;
    end
  assign store = state == STORE || state == STORE_SCALE;
  assign store_address = state == STORE_SCALE ? block_start : line_start + 32'(stored);
  assign store_data = state == STORE ? line[stored[1:0]*KW*8+:KW*8] : {(KW / 2) {exponent[3:0], mantissa[11:0]}};
  logic [KW-1:0] scale_strobe;
  always_comb
    for (int i = 0; i < KW; i++) scale_strobe[i] = 8'(i / 2) >= scale_first && 8'(i / 2) < scale_end;
  assign store_strobe = state == STORE ? {KW{1'b1}} : scale_strobe;

  always_ff @(posedge clk) begin
    done <= 1'b0;
    root_start <= 1'b0;
    divide_start <= 1'b0;
    scale_write <= 1'b0;
    query_write <= 1'b0;
    if (root_done) root_ready <= 1'b1;
    if (whole8 && pass2_8) line[at8[2:0]*VL*8+:VL*8] <= codes;
    waited <= waited + 1'b1;
    case (state)
      IDLE:
      if (start) begin
        state <= PASS1;
        busy <= 1'b1;
        norm_pass <= op == NORM;
        kind <= op;
        last_token <= count - 1'b1;
        token <= '0;
        at <= '0;
        at_last <= 1'b0;
        part <= 1'b0;
        turned <= op == HEADS;
        head <= '0;
        is_query <= 1'b1;
        is_key <= 1'b0;
        is_value <= 1'b0;
        query_group <= '0;
        query_in_group <= '0;
        head_row <= source;
      end
      PASS1:
      if (issue) begin
        // Norms go through all tokens for each beat of weights; others through a token's rows.
        part <= turned && !part;
        if (kind == NORM && {1'b0, token} != last_token) token <= token + 1'b1;
        else if (!turned || part) begin
          if (kind == NORM) token <= '0;
          at <= at + 1'b1;
          at_last <= at == length_less2;
          if (at_last) begin
            at <= '0;
            waited <= '0;
            norm_pass <= 1'b0;
            state <= DRAIN1;
          end
        end
      end
      DRAIN1:
      if (waited == 5'(END - 1)) begin
        waited <= '0;
        state <= FIT;
      end
      FIT: begin
        root_ready <= 1'b0;
        dividing_root <= 1'b0;
        root_start <= kind == NORM && waited == 5'd5;
        if (waited == 5'd7) begin
          numerator <= 16'd32512;
          denominator <= {full, 4'b0};
          divide_start <= 1'b1;
          state <= DIVIDE;
        end
      end
      DIVIDE: begin
        if (divide_done && !dividing_root) begin
          inverse <= quotient;
          if (kind != NORM) begin
            scale_mantissa <= plain_product[27:12];
            scale_shift <= -power;
            scale_write <= kind == CODES;
            query_write <= kind == HEADS && is_query;
            scale_column <= token;
            state <= PASS2;
          end else dividing_root <= 1'b1;
        end
        if (dividing_root && root_ready) begin
          root_ready <= 1'b0;
          numerator <= plain_product[27:12];
          denominator <= root;
          divide_start <= 1'b1;
        end
        if (divide_done && dividing_root) begin
          scale_mantissa <= quotient;
          scale_shift <= halvings - power;
          scale_write <= 1'b1;
          scale_column <= token;
          state <= PASS2;
        end
      end
      PASS2: begin
        at <= at + 1'b1;
        at_last <= at == length_less2;
        if (at_last) begin
          at <= '0;
          waited <= '0;
          state <= DRAIN2;
          head_row <= last_head ? source : head_row + length;
        end
      end
      DRAIN2: begin
        stored <= '0;
        if (waited == 5'd7) state <= kind == HEADS && !is_query ? STORE : NEXT;
      end
      STORE:
      if (store_ready) begin
        stored <= stored + 1'b1;
        if (stored + 1'b1 == head_chunks) state <= STORE_SCALE;
      end
      STORE_SCALE: if (store_ready) state <= NEXT;
      NEXT: begin
        state <= kind == NORM ? FIT : PASS1;
        waited <= '0;
        part <= 1'b0;
        if (kind == HEADS && !last_head) begin
          head <= head + 8'd1;
          is_query <= next_is_query;
          is_key <= next_is_key;
          is_value <= !next_is_query && !next_is_key;
          turned <= next_is_query || next_is_key;
          query_in_group <= group_ends ? 8'd0 : query_in_group + 8'd1;
          if (group_ends) query_group <= query_group + 8'd1;
        end else if ({1'b0, token} != last_token) begin
          token <= token + 1'b1;
          head <= '0;
          is_query <= 1'b1;
          is_key <= 1'b0;
          is_value <= 1'b0;
          turned <= kind == HEADS;
          query_group <= '0;
          query_in_group <= '0;
        end else begin
          done <= 1'b1;
          busy <= 1'b0;
          state <= IDLE;
        end
      end
      default: state <= IDLE;
    endcase
    if (rst) begin
      busy <= 1'b0;
      norm_pass <= 1'b0;
      state <= IDLE;
    end
  end
endmodule
