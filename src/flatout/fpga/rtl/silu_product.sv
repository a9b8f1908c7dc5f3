// silu(gate) * up, both with 16 fractional bits, at 32 bits; 4 cycles.
module silu_product (
    input  logic clk,
    input  logic signed [31:0] gate,
    input  logic signed [31:0] up,
    output logic signed [31:0] word
);
`include "tables.svh"
  logic [15:0] rom[0:512];
  initial for (int i = 0; i < 513; i++) rom[i] = SIGMOID[i*16+:16];

  logic [31:0] size;
  logic beyond;
  logic [8:0] index;
  assign size = gate < 0 ? -gate : gate;
  assign beyond = size[31:20] != 0;
  assign index = beyond ? 9'd511 : size[19:11];

  logic [15:0] from1, to1;
  logic [7:0] rest1;
  logic signed [31:0] gate1, up1, gate2, up2, up3, silu3;
  logic [16:0] factor2;
  logic [15:0] value;
  logic signed [49:0] product2;
  logic signed [63:0] product3, rounded3;
  assign value = from1 + 16'(((24'(to1 - from1)) * 24'(rest1)) >> 8);
  assign product2 = gate2 * $signed({1'b0, factor2});
  assign product3 = silu3 * up3;
  assign rounded3 = (product3 + 64'sd32768) >>> 16;
  always_ff @(posedge clk) begin
    from1 <= rom[{1'b0, index}];
    to1 <= rom[{1'b0, index}+10'd1];
    rest1 <= beyond ? 8'd255 : size[10:3];
    gate1 <= gate;
    up1 <= up;
    factor2 <= gate1 < 0 ? 17'd65536 - {1'b0, value} : {1'b0, value};
    gate2 <= gate1;
    up2 <= up1;
    silu3 <= 32'((product2 + 50'sd32768) >>> 16);
    up3 <= up2;
    if (rounded3 > 64'sd2147483647) word <= 32'sh7fffffff;
    else if (rounded3 < -64'sd2147483648) word <= 32'sh80000000;
    else word <= rounded3[31:0];
  end
endmodule
