// Beats of the FIFO as scales and chunks of rows: a beat of scales, then as many beats of codes as it has scales for.
//
// A chunk is taken in one cycle; what belongs to it is there in the next (names with 1).
module walker #(
    parameter int KW = 64,
    parameter int BITS = KW * 8
) (
    input logic clk,
    input logic rst,
    input logic start,
    input logic [19:0] units,  // rows, or pairs of rows
    input logic [7:0] chunks,  // of a row
    input logic [7:0] scale_period,  // beats of codes after each beat of scales
    input logic four_bits,
    output logic walking,
    input logic beat_valid,
    input logic [BITS-1:0] beat,
    output logic pop,
    output logic take,
    output logic [19:0] unit,
    output logic [7:0] chunk,
    output logic take1,
    output logic first1,
    output logic last1,
    output logic first_unit1,
    output logic [19:0] unit1,
    output logic [7:0] chunk1,
    output logic [31:0] scale1,
    output logic [BITS-1:0] beat1
);
  logic [7:0] scales_left;
  logic [BITS-1:0] scale_beat;
  logic scale_take;
  // Whether scales come next, the chunk is the last of its row, the row the last: known in advance, because much hangs on
  // them.
  logic scales_next, row_ends, last_row, first, first_unit;
  logic [19:0] rows_left;
  assign scale_take = walking && beat_valid && scales_next;
  assign take = walking && beat_valid && !scales_next;
  assign pop = walking && beat_valid;
  always_ff @(posedge clk) begin
    // What belongs to a chunk is there whether one was taken or not: `take` has enough to hang on it.
    take1 <= take && !rst;
    beat1 <= beat;
    scale1 <= scale_beat[31:0];
    first1 <= first;
    last1 <= row_ends;
    first_unit1 <= first_unit;
    unit1 <= unit;
    chunk1 <= chunk;
    if (pop) scale_beat <= scales_next ? beat : four_bits ? scale_beat >> 32 : scale_beat >> 16;
    if (scale_take) begin
      scales_left <= scale_period;
      scales_next <= 1'b0;
    end
    if (take) begin
      scales_left <= scales_left - 8'd1;
      scales_next <= scales_left == 8'd1;
      first <= row_ends;
      chunk <= row_ends ? '0 : chunk + 8'd1;
      row_ends <= row_ends ? chunks == 8'd1 : chunk + 8'd2 == chunks;
      if (row_ends) begin
        first_unit <= 1'b0;
        unit <= unit + 20'd1;
        rows_left <= rows_left - 20'd1;
        last_row <= rows_left == 20'd2;
        if (last_row) walking <= 1'b0;
      end
    end
    if (start) begin
      walking <= 1'b1;
      unit <= '0;
      first_unit <= 1'b1;
      chunk <= '0;
      first <= 1'b1;
      rows_left <= units;
      last_row <= units == 20'd1;
      row_ends <= chunks == 8'd1;
      scales_next <= 1'b1;
    end
    if (rst) walking <= 1'b0;
  end
endmodule
