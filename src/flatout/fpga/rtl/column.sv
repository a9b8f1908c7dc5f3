// What one column does with the sums of a pair of rows: scale, accumulate over the row, multiply, round.
// LATENCY cycles from `valid` with `last` to `ready`.
module column (
    input  logic clk,
    input  logic valid,
    input  logic first,
    input  logic last,
    input  logic narrow,  // 27 bits instead of 32
    input  logic signed [21:0] dot0,
    input  logic signed [21:0] dot1,
    input  logic [15:0] scale0,  // exponent, mantissa
    input  logic [15:0] scale1,
    input  logic [1:0] spread,  // the chunk's codes were made 2**spread times as large
    input  logic [15:0] mantissa,
    input  logic [5:0] shift,
    output logic ready,
    output logic signed [31:0] word0,
    output logic signed [31:0] word1
);
  logic signed [34:0] scaled0, scaled1;
  logic [4:0] up0, up1;
  logic valid1, first1, last1, last2, last3;
  logic signed [47:0] sum0, sum1;
  logic signed [63:0] product0, product1;

  function automatic logic signed [31:0] fit(input logic signed [63:0] product, input logic [5:0] by,
                                             input logic small_);
    logic signed [63:0] rounded;
    rounded = (product + (64'sd1 <<< (by - 6'd1))) >>> by;
    if (small_) begin
      if (rounded > 64'sd67108863) fit = 32'sd67108863;
      else if (rounded < -64'sd67108864) fit = -32'sd67108864;
      else fit = rounded[31:0];
    end else begin
      if (rounded > 64'sd2147483647) fit = 32'sh7fffffff;
      else if (rounded < -64'sd2147483648) fit = 32'sh80000000;
      else fit = rounded[31:0];
    end
  endfunction

  always_ff @(posedge clk) begin
    valid1 <= valid;
    first1 <= first;
    last1 <= valid && last;
    if (valid) begin
      scaled0 <= dot0 * $signed({1'b0, scale0[11:0]});
      scaled1 <= dot1 * $signed({1'b0, scale1[11:0]});
      up0 <= {1'b0, scale0[15:12]} + {3'b0, ~spread};
      up1 <= {1'b0, scale1[15:12]} + {3'b0, ~spread};
    end
    if (valid1) begin
      sum0 <= (first1 ? 48'sd0 : sum0) + (48'(scaled0) <<< up0);
      sum1 <= (first1 ? 48'sd0 : sum1) + (48'(scaled1) <<< up1);
    end
    last2 <= last1;
    if (last2) begin
      product0 <= sum0 * $signed({1'b0, mantissa});
      product1 <= sum1 * $signed({1'b0, mantissa});
    end
    last3 <= last2;
    if (last3) begin
      word0 <= fit(product0, shift, narrow);
      word1 <= fit(product1, shift, narrow);
    end
    ready <= last3;
  end
endmodule
