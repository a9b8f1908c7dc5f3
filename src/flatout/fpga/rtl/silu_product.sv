// silu(gate) * up, both with 16 fractional bits, at 32 bits; 13 cycles.
//
// The sigmoid is a table of values and of steps to the next value. Block RAM answers late in the cycle: what was read passes
// through a register.
module silu_product (
    input  logic clk,
    input  logic signed [31:0] gate,
    input  logic signed [31:0] up,
    output logic [31:0] word
);
`include "tables.svh"
`include "round.svh"
  (* rom_style = "block" *) logic [25:0] sigmoid[0:511];  // step, value
  initial for (int i = 0; i < 512; i++) sigmoid[i] = {SIGMOID_RISES[i*16+:10], SIGMOID[i*16+:16]};

  logic [31:0] size1;
  logic beyond2, beyond3, beyond4;  // of the table, where the sigmoid is one
  logic [6*32-1:0] gates;
  logic [9*32-1:0] ups;
  logic [25:0] read2;
  logic [15:0] value3, value4, value5;
  logic [9:0] step3;
  logic [7:0] rest2, rest3;
  logic [17:0] rise4;
  logic [16:0] factor6;
  logic signed [33:0] high7, low7;
  logic signed [49:0] product8;
  logic signed [31:0] silu9, up9;
  logic signed [29:0] high10;
  logic signed [32:0] cross10, other10, cross11;
  logic [33:0] low10;
  logic signed [63:0] outer11, product12;
  assign up9 = ups[9*32-1-:32];
  always_ff @(posedge clk) begin
    gates <= {gates[5*32-1:0], gate};
    ups <= {ups[8*32-1:0], up};
    size1 <= gate < 0 ? -gate : gate;
    read2 <= sigmoid[size1[19:11]];
    rest2 <= size1[10:3];
    {step3, value3} <= read2;
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
    // Four products of 17 bits, one multiplier each: the outer two lie beside each other.
    high10 <= $signed(silu9[31:17]) * $signed(up9[31:17]);
    cross10 <= $signed(silu9[31:17]) * $signed({1'b0, up9[16:0]});
    other10 <= $signed(up9[31:17]) * $signed({1'b0, silu9[16:0]});
    low10 <= silu9[16:0] * up9[16:0];
    outer11 <= {high10, low10};
    cross11 <= cross10 + other10;
    product12 <= outer11 + {{14{cross11[32]}}, cross11, 17'b0};
    word <= round_limit(product12 >>> 15, 1'b0);
  end
endmodule
