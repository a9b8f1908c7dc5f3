// One lane of the vector unit: multiply, join the parts of a turned pair, shift twice, round (5 cycles), and the square of the
// word without its 5 lowest bits (3 cycles). What each stage is told comes when it needs it.
module vector_lane (
    input logic clk,
    input logic enable,
    input logic signed [31:0] word2,
    input logic signed [15:0] factor2,
    input logic keep3,  // the first part of a pair
    input logic turned3,
    input logic minus3,
    input logic [5:0] right3,  // shift - 1, for the next cycle
    input logic narrow6,
    output logic [31:0] word7,
    output logic [55:0] square5
);
`include "round.svh"
  logic signed [47:0] product3, kept;
  logic signed [48:0] sum4, near5, twice6;
  logic signed [27:0] near3;
  logic signed [27:0] high4;
  logic signed [28:0] cross4;
  logic [27:0] low4;
  // Each lane has its own: too much hangs on them.
  (* keep *) logic [5:0] right4;
  (* keep *) logic [2:0] right5;
  always_ff @(posedge clk)
    if (enable) begin
      right4 <= right3;
      product3 <= word2 * factor2;
      if (keep3) kept <= product3;
      sum4 <= !turned3 ? 49'(product3) : minus3 ? 49'(kept) - 49'(product3) : 49'(kept) + 49'(product3);
      near5 <= sum4 >>> {right4[5:3], 3'b0};
      right5 <= right4[2:0];
      twice6 <= near5 >>> right5;
      word7 <= round_limit(64'(twice6), narrow6);
      near3 <= 28'($signed(word2[31:5])) + $signed({27'b0, word2[4]});
      high4 <= $signed(near3[27:14]) * $signed(near3[27:14]);
      cross4 <= $signed(near3[27:14]) * $signed({1'b0, near3[13:0]});
      low4 <= near3[13:0] * near3[13:0];
      square5 <= {high4, low4} + 56'({cross4, 15'b0} | {{12{cross4[28]}}, 44'b0});
    end
endmodule
