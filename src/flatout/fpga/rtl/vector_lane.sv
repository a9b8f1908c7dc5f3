// One lane of the vector unit: multiply, join the parts of a turned pair, shift twice, round (6 cycles), and the square of the
// word without its 5 lowest bits (3 cycles). What each stage is told comes when it needs it.
module vector_lane (
    input logic clk,
    input logic enable,
    input logic signed [31:0] word2,
    input logic signed [15:0] factor2,
    input logic keep4,  // the first part of a pair
    input logic turned4,
    input logic minus4,
    input logic [5:0] right4,  // shift - 1, for the next cycle
    input logic narrow7,
    output logic [31:0] word8,
    output logic [55:0] square5
);
`include "round.svh"
  logic signed [33:0] low3;
  logic signed [30:0] high3;
  logic signed [47:0] product4, kept;
  logic signed [48:0] sum5, near6, twice7;
  logic signed [27:0] near3;
  logic signed [27:0] high4;
  logic signed [28:0] cross4;
  logic [27:0] low4;
  // Each lane has its own: too much hangs on them.
  (* keep *) logic [5:0] right5;
  (* keep *) logic [2:0] right6;
  always_ff @(posedge clk)
    if (enable) begin
      right5 <= right4;
      low3 <= $signed({1'b0, word2[16:0]}) * factor2;
      high3 <= $signed(word2[31:17]) * factor2;
      product4 <= 48'(low3) + {high3, 17'b0};
      if (keep4) kept <= product4;
      sum5 <= !turned4 ? 49'(product4) : minus4 ? 49'(kept) - 49'(product4) : 49'(kept) + 49'(product4);
      near6 <= sum5 >>> {right5[5:3], 3'b0};
      right6 <= right5[2:0];
      twice7 <= near6 >>> right6;
      word8 <= round_limit(64'(twice7), narrow7);
      near3 <= 28'($signed(word2[31:5])) + $signed({27'b0, word2[4]});
      high4 <= $signed(near3[27:14]) * $signed(near3[27:14]);
      cross4 <= $signed(near3[27:14]) * $signed({1'b0, near3[13:0]});
      low4 <= near3[13:0] * near3[13:0];
      square5 <= {high4, low4} + 56'({cross4, 15'b0} | {{12{cross4[28]}}, 44'b0});
    end
endmodule
