// silu(gate) * up, both with 16 fractional bits, at 32 bits; 12 cycles.
//
// The sigmoid is a table of values and one of steps to the next value, in logic and read in two steps: eight words that
// differ in the highest bits of the address, then one of them.
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
  logic beyond2, beyond3, beyond4;  // of the table, where the sigmoid is one
  logic [6*32-1:0] gates;
  logic [9*32-1:0] ups;
  logic [8*26-1:0] words2;
  logic [2:0] high2;
  logic [15:0] value3, value4, value5;
  logic [9:0] step3;
  logic [7:0] rest2, rest3;
  logic [17:0] rise4;
  logic [16:0] factor6;
  logic signed [33:0] high7, low7;
  logic signed [49:0] product8;
  logic signed [31:0] silu9;
  logic signed [47:0] high10;
  logic signed [48:0] low10;
  logic signed [63:0] product11;
  always_ff @(posedge clk) begin
    gates <= {gates[5*32-1:0], gate};
    ups <= {ups[8*32-1:0], up};
    size1 <= gate < 0 ? -gate : gate;
    for (int i = 0; i < 8; i++) words2[i*26+:26] <= {step[{3'(i), size1[16:11]}], value[{3'(i), size1[16:11]}]};
    high2 <= size1[19:17];
    rest2 <= size1[10:3];
    {step3, value3} <= words2[high2*26+:26];
    rest3 <= rest2;
    beyond2 <= size1[31:20] != 0;
    {beyond4, beyond3} <= {beyond3, beyond2};
    rise4 <= 18'(step3) * 18'(rest3);
    value4 <= value3;
    value5 <= beyond4 ? 16'hffff : value4 + 16'(rise4[17:8]);
    factor6 <= gates[5*32-1] ? 17'd65536 - {1'b0, value5} : {1'b0, value5};
    high7 <= $signed(gates[6*32-1-:16]) * $signed({1'b0, factor6});
    low7 <= $signed({1'b0, gates[5*32+:16]}) * $signed({1'b0, factor6});
    product8 <= 50'(low7) + {high7, 16'b0};
    silu9 <= 32'((product8 + 50'sd32768) >>> 16);
    high10 <= silu9 * $signed(ups[9*32-1-:16]);
    low10 <= silu9 * $signed({1'b0, ups[9*32-17-:16]});
    product11 <= 64'(low10) + {high10, 16'b0};
    word <= round_limit(product11 >>> 15, 1'b0);
  end
endmodule
