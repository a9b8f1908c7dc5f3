// silu(gate) * up, both with 16 fractional bits, at 32 bits; 10 cycles.
//
// The sigmoid is a table of values and one of steps to the next value, in logic: block RAM answers too late for a product.
module silu_product (
    input  logic clk,
    input  logic signed [31:0] gate,
    input  logic signed [31:0] up,
    output logic [31:0] word
);
`include "tables.svh"
`include "round.svh"
  (* rom_style = "logic" *) logic [15:0] value[0:511];
  (* rom_style = "logic" *) logic [9:0] step[0:511];
  initial
    for (int i = 0; i < 512; i++) begin
      value[i] = SIGMOID[i*16+:16];
      step[i] = SIGMOID_RISES[i*16+:10];
    end

  logic [31:0] size1;
  logic beyond2, beyond3;  // of the table, where the sigmoid is one
  logic [5*32-1:0] gates;
  logic [7*32-1:0] ups;
  logic [15:0] value2, value3, value4;
  logic [9:0] step2;
  logic [7:0] rest2;
  logic [17:0] rise3;
  logic [16:0] factor5;
  logic signed [49:0] product6;
  logic signed [31:0] silu7;
  logic signed [47:0] high8;
  logic signed [48:0] low8;
  logic signed [63:0] product9;
  always_ff @(posedge clk) begin
    gates <= {gates[4*32-1:0], gate};
    ups <= {ups[6*32-1:0], up};
    size1 <= gate < 0 ? -gate : gate;
    value2 <= value[size1[19:11]];
    step2 <= step[size1[19:11]];
    rest2 <= size1[10:3];
    beyond2 <= size1[31:20] != 0;
    beyond3 <= beyond2;
    rise3 <= 18'(step2) * 18'(rest2);
    value3 <= value2;
    value4 <= beyond3 ? 16'hffff : value3 + 16'(rise3[17:8]);
    factor5 <= gates[4*32-1] ? 17'd65536 - {1'b0, value4} : {1'b0, value4};
    product6 <= $signed(gates[5*32-1-:32]) * $signed({1'b0, factor5});
    silu7 <= 32'((product6 + 50'sd32768) >>> 16);
    high8 <= silu7 * $signed(ups[7*32-1-:16]);
    low8 <= silu7 * $signed({1'b0, ups[7*32-17-:16]});
    product9 <= 64'(low8) + {high8, 16'b0};
    word <= round_limit(product9 >>> 15, 1'b0);
  end
endmodule
