// sum * mantissa / 2**shift, rounded half up and limited to 27 or 32 bits; 5 cycles. The product is made of three of 17 bits,
// one multiplier each: the outer two lie beside each other, so that one sum joins all. The shift is a coarse and a fine one.
module rescale (
    input logic clk,
    input logic signed [47:0] sum,
    input logic [15:0] mantissa,
    input logic [5:0] shift,
    input logic narrow,
    output logic [31:0] word
);
`include "round.svh"
  logic [32:0] low, middle;
  logic signed [29:0] high;
  logic signed [63:0] product, near, twice;
  logic [5:0] less1, less2;
  logic [2:0] less3;
  always_ff @(posedge clk) begin
    low <= sum[16:0] * mantissa;
    middle <= sum[33:17] * mantissa;
    high <= $signed(sum[47:34]) * $signed({1'b0, mantissa});
    less1 <= shift - 6'd1;
    product <= {high, 1'b0, low} + {14'b0, middle, 17'b0};
    less2 <= less1;
    near <= product >>> {less2[5:3], 3'b0};
    less3 <= less2[2:0];
    twice <= near >>> less3;
    word <= round_limit(twice, narrow);
  end
endmodule
