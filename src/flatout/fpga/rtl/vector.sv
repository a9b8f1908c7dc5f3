// The integer vector unit: norms, rounding to codes, rotary embedding, keys and values.
//
// VL lanes of one multiplier each. Rows of VL words are read from the vector memory of one token at a time:
//   pass 1  multiply by the norm's weights, turn pairs, or just look; note the largest of the row's chunk
//   scale   mantissa, exponent and reciprocal of the largest; root of the mean square for norms
//   pass 2  multiply by the reciprocal, round to codes, write them to the activation memory or as a key or value
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
  typedef enum logic [3:0] {
    IDLE, PASS1, DRAIN1, FIT0, FIT1, FIT2, ROOT, DIVIDE, PASS2, DRAIN2, STORE, STORE_SCALE, NEXT
  } state_t;
  state_t state;

  logic [1:0] kind;
  logic [CB-1:0] token;
  logic [CB:0] last_token;
  logic [ROWS_LOG2-1:0] at;
  logic part;
  logic [2:0] wait_;
  logic [7:0] head, query_group, query_in_group;
  logic [ROWS_LOG2-1:0] head_row;
  logic is_query, is_key, is_value, turned;
  assign is_query = head < query_heads;
  assign is_key = !is_query && head < query_heads + kv_heads;
  assign is_value = !is_query && !is_key;
  assign turned = kind == HEADS && !is_value;
  logic [ROWS_LOG2-1:0] length, half_rows, half_at, base;
  assign half_rows = {{(ROWS_LOG2 - 3) {1'b0}}, head_chunks};
  assign length = kind == HEADS ? {half_rows[ROWS_LOG2-2:0], 1'b0} : rows;
  assign half_at = at >= half_rows ? at - half_rows : at;
  assign base = kind == HEADS ? head_row : source;

  // Stage 0: which row, and what it is multiplied by.
  logic issue, issue_part, second;
  assign second = at >= half_rows;
  logic pass2;
  assign pass2 = state == PASS2;
  assign issue = (state == PASS1 && (kind != NORM || beat_valid)) || pass2;
  assign read = issue;
  assign read_column = token;
  assign read_row = pass2 ? ((kind == NORM || turned) ? scratch + at : base + at)
                  : turned ? (part ? base + half_at + half_rows : base + half_at) : base + at;
  assign turn_column = token;
  // cos for the first of a first half and the second of a second half, sin for the others
  assign turn_row = (second ^ part) ? 4'(half_at + half_rows) : 4'(half_at);
  assign beat_pop = state == PASS1 && kind == NORM && beat_valid && {1'b0, token} == last_token;

  // Stage 1: the row is here.
  logic valid1, pass2_1, norm1, turned1, part1, minus1, last1;
  logic [CB-1:0] token1;
  logic [ROWS_LOG2-1:0] at1;
  logic [KW*8-1:0] gamma1;
  logic [15:0] inverse;
  // Stage 2: products.
  logic valid2, pass2_2, norm2, turned2, part2, minus2, plain2;
  logic [CB-1:0] token2;
  logic [ROWS_LOG2-1:0] at2;
  logic signed [48:0] product[0:VL-1], kept[0:VL-1];
  logic signed [31:0] word2[0:VL-1];
  logic [55:0] square[0:VL-1];
  logic [5:0] shift2;
  // Stage 3: rounded.
  logic valid3, pass2_3;
  logic [CB-1:0] token3;
  logic [ROWS_LOG2-1:0] at3;
  logic [VL*32-1:0] word3;
  logic [63:0] squares;
  logic square3;
  // Stage 4: the row's largest.
  logic valid4;
  logic [CB-1:0] token4;
  logic [ROWS_LOG2-1:0] at4;
  logic [31:0] largest4, largest3;

  logic [31:0] largest[0:C-1];
  logic [63:0] square_sum[0:C-1];
  logic [31:0] chunk_largest[0:C*CHUNKS-1];

  // The scale of what pass 1 has seen.
  logic [31:0] top;
  logic [5:0] digits;
  logic [4:0] exponent;
  logic [12:0] mantissa;
  logic [3:0] missing;
  logic [11:0] full;
  logic signed [7:0] power;
  logic [63:0] mean;
  logic [6:0] mean_digits;
  logic signed [7:0] halvings;
  logic [15:0] plain_mantissa, root, quotient;
  logic root_start, root_done, divide_start, divide_done, root_ready, dividing_root;
  logic [15:0] numerator, denominator;
  logic [31:0] fitted;
  logic [37:0] bound;  // the largest code stands for this
  logic [27:0] plain_product;
  assign plain_product = full * (kind == HEADS && is_query ? score_factor : factor);

  function automatic logic [6:0] count_digits(input logic [63:0] x);
    count_digits = '0;
    for (int i = 0; i < 64; i++) if (x[i]) count_digits = 7'(i + 1);
  endfunction

  divide divider (.clk, .rst, .start(divide_start), .numerator, .denominator, .done(divide_done), .quotient);
  square_root rooter (.clk, .rst, .start(root_start), .square(fitted), .done(root_done), .root);

  logic [31:0] spread_largest;
  assign spread_largest = chunk_largest[{token1, 6'(at1>>1)}];
  logic [1:0] spread_now;
  always_comb begin
    spread_now = 2'd0;
    if ({5'b0, spread_largest, 1'b0} <= bound) spread_now = 2'd1;
    if ({4'b0, spread_largest, 2'b0} <= bound) spread_now = 2'd2;
    if ({3'b0, spread_largest, 3'b0} <= bound) spread_now = 2'd3;
    if (kind == HEADS) spread_now = 2'd0;
  end

  logic [31:0] size;
  always_comb begin
    largest3 = '0;
    for (int l = 0; l < VL; l++) begin
      size = word3[l*32+31] ? -word3[l*32+:32] : word3[l*32+:32];
      if (size > largest3) largest3 = size;
    end
  end

  logic signed [48:0] turned_sum;
  logic signed [63:0] rounded;
  logic signed [27:0] narrowed;
  always_ff @(posedge clk) begin
    valid1 <= issue && !rst;
    pass2_1 <= pass2;
    norm1 <= kind == NORM && !pass2;
    turned1 <= turned && !pass2;
    part1 <= part;
    minus1 <= !second;
    token1 <= token;
    at1 <= at;
    gamma1 <= beat;

    valid2 <= valid1 && !rst;
    pass2_2 <= pass2_1;
    norm2 <= norm1;
    turned2 <= turned1;
    part2 <= part1;
    minus2 <= minus1;
    token2 <= token1;
    at2 <= at1;
    plain2 <= !(pass2_1 || norm1 || turned1);
    if (valid1)
      for (int l = 0; l < VL; l++) begin
        product[l] <= $signed(row[l*32+:32]) * $signed(
            pass2_1 ? inverse : norm1 ? gamma1[l*16+:16] : turn[l*16+:16]
        );
        word2[l] <= $signed(row[l*32+:32]);
        if (norm1) begin
          narrowed = 28'($signed(row[l*32+5+:27])) + $signed({27'b0, row[l*32+4]});
          square[l] <= narrowed * narrowed;
        end
      end
    shift2 <= pass2_1 ? 6'(8'sd19 + power - 8'(spread_now)) : norm1 ? gamma_shift : 6'd14;
    spread_write <= valid1 && pass2_1 && at1[0] && kind != HEADS;
    spread_chunk <= 8'(at1 >> 1);
    spread <= spread_now;

    valid3 <= valid2 && !rst && !(turned2 && !part2);
    pass2_3 <= pass2_2;
    token3 <= token2;
    at3 <= at2;
    square3 <= valid2 && norm2;
    if (valid2) begin
      squares = '0;
      for (int l = 0; l < VL; l++) begin
        if (turned2 && !part2) kept[l] <= product[l];
        turned_sum = turned2 ? (minus2 ? kept[l] - product[l] : kept[l] + product[l]) : product[l];
        rounded = (64'(turned_sum) + (64'sd1 <<< (shift2 - 6'd1))) >>> shift2;
        if (plain2) rounded = 64'(word2[l]);
        if (turned2) begin
          if (rounded > 64'sd67108863) rounded = 64'sd67108863;
          if (rounded < -64'sd67108864) rounded = -64'sd67108864;
        end
        if (rounded > 64'sd2147483647) rounded = 64'sd2147483647;
        if (rounded < -64'sd2147483648) rounded = -64'sd2147483648;
        word3[l*32+:32] <= rounded[31:0];
        squares = squares + 64'(square[l]);
      end
      if (norm2) square_sum[token2] <= (at2 == 0 ? 64'(epsilon) : square_sum[token2]) + squares;
    end

    valid4 <= valid3 && !pass2_3 && !rst;
    token4 <= token3;
    at4 <= at3;
    if (valid3 && !pass2_3) largest4 <= largest3;
    if (valid4) begin
      largest[token4] <= (at4 == 0 || largest4 > largest[token4]) ? largest4 : largest[token4];
      if (!at4[0] || largest4 > chunk_largest[{token4, 6'(at4>>1)}])
        chunk_largest[{token4, 6'(at4>>1)}] <= largest4;
    end
  end

  assign write = valid3 && !pass2_3 && (kind == NORM || turned);
  assign write_row = scratch + at3;
  assign write_column = token3;
  assign write_words = word3;
  always_comb for (int l = 0; l < VL; l++) codes[l*8+:8] = word3[l*32+:8];
  assign code_write = valid3 && pass2_3 && (kind != HEADS || is_query);
  assign code_column = kind == HEADS ? CB'(query_in_group) : token3;
  logic [7:0] query_row;
  assign query_row = 8'((8'(token3) * kv_heads + query_group) * 8'(head_chunks));
  assign code_row = (kind == HEADS ? query_row : 8'd0) + 8'(at3 >> 1);
  assign code_half = at3[0];
  assign scale_head = head;

  logic [KW*8*4-1:0] line;  // codes of one key or value
  logic [2:0] stored;
  logic [7:0] place;
  logic [31:0] block_start;
  assign place = offset[token*8+:8];
  logic [7:0] kv_head;
  assign kv_head = is_key ? head - query_heads : head - query_heads - kv_heads;
  assign store = state == STORE || state == STORE_SCALE;
  assign store_address = block_start + (state == STORE_SCALE ? 32'd0 : 32'd1 + 32'(place * head_chunks) + 32'(stored));
  assign store_data = state == STORE ? line[stored*KW*8+:KW*8] : {(KW / 2) {exponent[3:0], mantissa[11:0]}};
  logic [KW-1:0] scale_strobe;
  always_comb
    for (int i = 0; i < KW; i++)
      scale_strobe[i] = 8'(i / 2) >= place * head_chunks && 8'(i / 2) < (place + 8'd1) * head_chunks;
  assign store_strobe = state == STORE ? {KW{1'b1}} : scale_strobe;

  always_ff @(posedge clk) begin
    done <= 1'b0;
    root_start <= 1'b0;
    divide_start <= 1'b0;
    scale_write <= 1'b0;
    query_write <= 1'b0;
    if (root_done) root_ready <= 1'b1;
    if (valid3 && pass2_3) line[at3*VL*8+:VL*8] <= codes;
    case (state)
      IDLE:
      if (start) begin
        state <= PASS1;
        kind <= op;
        last_token <= count - 1'b1;
        token <= '0;
        at <= '0;
        part <= 1'b0;
        head <= '0;
        query_group <= '0;
        query_in_group <= '0;
        head_row <= source;
        wait_ <= '0;
      end
      PASS1:
      if (issue) begin
        // Norms go through all tokens for each beat of weights; others through a token's rows.
        part <= turned && !part;
        if (kind == NORM && {1'b0, token} != last_token) token <= token + 1'b1;
        else if (!turned || part) begin
          if (kind == NORM) token <= '0;
          at <= at + 1'b1;
          if (at + 1'b1 == length) begin
            at <= '0;
            state <= DRAIN1;
          end
        end
      end
      DRAIN1: begin
        wait_ <= wait_ + 1'b1;
        if (wait_ == 3'd4) begin
          wait_ <= '0;
          state <= FIT0;
        end
      end
      FIT0: begin
        top <= largest[token] == 0 ? 32'd1 : largest[token];
        digits <= 6'(count_digits({32'b0, largest[token] == 0 ? 32'd1 : largest[token]}));
        mean <= square_sum[token];
        mean_digits <= count_digits(square_sum[token]);
        state <= FIT1;
      end
      FIT1: begin
        exponent <= digits > 12 ? 5'(digits - 6'd12) : 5'd0;
        mantissa <= digits > 12 ? 13'((33'(top) + (33'd1 << (digits - 6'd12)) - 33'd1) >> (digits - 6'd12)) : 13'(top);
        missing <= digits < 12 ? 4'(6'd12 - digits) : 4'd0;
        // Half of what is above 32 digits, rounded up; half of what is below, rounded down.
        halvings <= 8'(($signed({1'b0, mean_digits}) - 8'sd31) >>> 1);
        state <= FIT2;
      end
      FIT2: begin
        if (mantissa == 13'd4096) begin
          mantissa <= 13'd2048;
          exponent <= exponent + 1'b1;
          full <= 12'd2048;
          power <= 8'(exponent) + 8'sd1;
        end else begin
          full <= 12'(mantissa << missing);
          power <= 8'(exponent) - 8'(missing);
        end
        fitted <= halvings >= 0 ? 32'(mean >> {halvings[5:0], 1'b0}) : 32'(mean << {6'(-halvings), 1'b0});
        root_start <= kind == NORM;
        root_ready <= 1'b0;
        dividing_root <= 1'b0;
        state <= ROOT;
      end
      ROOT: begin
        bound <= 38'(mantissa) << exponent;
        plain_mantissa <= plain_product[27:12];
        numerator <= 16'd32512;
        denominator <= {full, 4'b0};
        divide_start <= 1'b1;
        state <= DIVIDE;
      end
      DIVIDE: begin
        if (divide_done && !dividing_root) begin
          inverse <= quotient;
          if (kind != NORM) begin
            scale_mantissa <= plain_mantissa;
            scale_shift <= -power;
            scale_write <= kind == CODES;
            query_write <= kind == HEADS && is_query;
            scale_column <= token;
            state <= PASS2;
          end else dividing_root <= 1'b1;
        end
        if (dividing_root && root_ready) begin
          root_ready <= 1'b0;
          numerator <= plain_mantissa;
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
        if (at + 1'b1 == length) begin
          at <= '0;
          state <= DRAIN2;
        end
      end
      DRAIN2: begin
        wait_ <= wait_ + 1'b1;
        stored <= '0;
        block_start <= cache + 32'(kv_head) * head_stride + (is_value ? value_offset : 32'd0) +
            32'(block[token*24+:24]) * (32'(block_beats) + 32'd1);
        if (wait_ == 3'd3) begin
          wait_ <= '0;
          state <= kind == HEADS && !is_query ? STORE : NEXT;
        end
      end
      STORE:
      if (store_ready) begin
        stored <= stored + 1'b1;
        if (stored + 1'b1 == head_chunks) state <= STORE_SCALE;
      end
      STORE_SCALE: if (store_ready) state <= NEXT;
      NEXT: begin
        state <= kind == NORM ? FIT0 : PASS1;
        part <= 1'b0;
        if (kind == HEADS && head + 8'd1 != query_heads + {kv_heads[6:0], 1'b0}) begin
          head <= head + 8'd1;
          head_row <= head_row + length;
          query_in_group <= query_in_group + 8'd1 == group_heads ? 8'd0 : query_in_group + 8'd1;
          if (query_in_group + 8'd1 == group_heads) query_group <= query_group + 8'd1;
        end else if ({1'b0, token} != last_token) begin
          token <= token + 1'b1;
          head <= '0;
          head_row <= source;
          query_group <= '0;
          query_in_group <= '0;
        end else begin
          done <= 1'b1;
          state <= IDLE;
        end
      end
      default: state <= IDLE;
    endcase
    if (rst) state <= IDLE;
  end
endmodule
