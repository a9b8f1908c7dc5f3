// Softmax and the weighted sum of values for one query head: weights 2**(score - largest) are made as values arrive.
//
// A value's beat is added 4 cycles after `valid`. `total` sums the weights of whole tokens.
module weighted_sum #(
    parameter int KW = 64,
    parameter int CHUNKS = 4,
    parameter int DRAIN = KW / 16
) (
    input logic clk,
    input logic valid,
    input logic first_token,
    input logic [1:0] chunk,
    input logic signed [31:0] score,
    input logic signed [31:0] largest,
    input logic [15:0] scale,  // exponent, mantissa
    input logic [KW*8-1:0] codes4,  // 3 cycles after `valid`
    output logic [31:0] total,
    input logic [5:0] drain_index,  // word / DRAIN
    output logic [DRAIN*48-1:0] drain
);
`include "tables.svh"
  logic [15:0] rom[0:256];
  initial for (int i = 0; i < 257; i++) rom[i] = EXP2[i*16+:16];

  logic [31:0] distance;
  assign distance = largest - score;
  logic valid1, valid2, valid3, first1, first2, first3;
  logic [1:0] chunk1, chunk2, chunk3;
  logic [15:0] from1, to1, probability2, scale1, scale2;
  logic [7:0] rest1;
  logic [15:0] whole1;
  logic [15:0] value1;
  logic [26:0] weight3;
  logic [42:0] spread2;
  logic signed [47:0] sums[0:CHUNKS*KW-1];
  assign value1 = from1 - 16'((24'(from1 - to1) * 24'(rest1)) >> 8);
  assign spread2 = 43'(28'(probability2) * 28'(scale2[11:0])) << scale2[15:12];

  always_ff @(posedge clk) begin
    valid1 <= valid;
    first1 <= first_token;
    chunk1 <= chunk;
    if (valid) begin
      from1 <= rom[{1'b0, distance[15:8]}];
      to1 <= rom[{1'b0, distance[15:8]}+9'd1];
      rest1 <= distance[7:0];
      whole1 <= distance[31:16];
      scale1 <= scale;
    end
    valid2 <= valid1;
    first2 <= first1;
    chunk2 <= chunk1;
    if (valid1) begin
      probability2 <= whole1 > 16'd15 ? 16'd0 : value1 >> whole1[3:0];
      scale2 <= scale1;
    end
    valid3 <= valid2;
    first3 <= first2;
    chunk3 <= chunk2;
    if (valid2) begin
      weight3 <= 27'((spread2 + 43'd65536) >> 17);
      if (chunk2 == 0) total <= (first2 ? 32'd0 : total) + 32'(probability2);
    end
    if (valid3)
      for (int l = 0; l < KW; l++)
        sums[chunk3*KW+l] <= (first3 ? 48'sd0 : sums[chunk3*KW+l]) + 48'($signed(weight3) * $signed(codes4[l*8+:8]));
  end
  always_comb for (int i = 0; i < DRAIN; i++) drain[i*48+:48] = sums[drain_index*DRAIN+i];
endmodule
