// sum * mantissa / 2**shift, rounded half up and limited to 27 or 32 bits; 5 cycles. The product is made of two, the shift
// of a coarse and a fine one.
module rescale (
    input logic clk,
    input logic signed [47:0] sum,
    input logic [15:0] mantissa,
    input logic [5:0] shift,
    input logic narrow,
    output logic [31:0] word
);
`include "round.svh"
  logic signed [41:0] low;
  logic signed [40:0] high;
  logic signed [63:0] product, near, twice;
  logic [5:0] less1, less2;
  logic [2:0] less3;
  always_ff @(posedge clk) begin
    low <= $signed({1'b0, sum[23:0]}) * $signed({1'b0, mantissa});
    high <= $signed(sum[47:24]) * $signed({1'b0, mantissa});
    less1 <= shift - 6'd1;
    product <= 64'(low) + {high[39:0], 24'b0};
    less2 <= less1;
    near <= product >>> {less2[5:3], 3'b0};
    less3 <= less2[2:0];
    twice <= near >>> less3;
    word <= round_limit(twice, narrow);
  end
endmodule
