// What one column does with the sums of a pair of rows: scale, accumulate over the row, multiply, round. 8 cycles from
// `valid` with `last` to `ready`.
module column #(
    parameter int DOT_BITS = 21  // of a sum of a chunk
) (
    input  logic clk,
    input  logic valid,
    input  logic first,
    input  logic last,
    input  logic narrow,  // 27 bits instead of 32
    input  logic signed [DOT_BITS-1:0] dot0,
    input  logic signed [DOT_BITS-1:0] dot1,
    input  logic [15:0] scale0,  // exponent, mantissa
    input  logic [15:0] scale1,
    input  logic [1:0] spread,  // the chunk's codes were made 2**spread times as large
    input  logic [15:0] mantissa,
    input  logic [5:0] shift,
    output logic ready,
    output logic [31:0] word0,
    output logic [31:0] word1
);
  logic signed [DOT_BITS+12:0] scaled0, scaled1;
  logic [4:0] up0, up1;
  logic valid1, first1, valid2, first2;
  logic [6:0] last_;
  logic signed [47:0] shifted0, shifted1, sum0, sum1;
  always_ff @(posedge clk) begin
    valid1 <= valid;
    first1 <= first;
    if (valid) begin
      scaled0 <= dot0 * $signed({1'b0, scale0[11:0]});
      scaled1 <= dot1 * $signed({1'b0, scale1[11:0]});
      up0 <= {1'b0, scale0[15:12]} + {3'b0, ~spread};
      up1 <= {1'b0, scale1[15:12]} + {3'b0, ~spread};
    end
    valid2 <= valid1;
    first2 <= first1;
    if (valid1) begin
      shifted0 <= 48'(scaled0) <<< up0;
      shifted1 <= 48'(scaled1) <<< up1;
    end
    if (valid2) begin
      sum0 <= (first2 ? 48'sd0 : sum0) + shifted0;
      sum1 <= (first2 ? 48'sd0 : sum1) + shifted1;
    end
    {ready, last_} <= {last_, valid && last};
  end
  rescale low (.clk, .sum(sum0), .mantissa, .shift, .narrow, .word(word0));
  rescale high (.clk, .sum(sum1), .mantissa, .shift, .narrow, .word(word1));
endmodule
