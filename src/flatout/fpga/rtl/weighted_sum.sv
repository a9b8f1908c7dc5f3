// Softmax and the weighted sum of values for one query head: weights 2**(score - largest) are made as values arrive.
//
// `total` sums the weights of whole tokens. Sums are complete 14 cycles after the last `valid`.
module weighted_sum #(
    parameter int KW = 64,
    parameter int CHUNKS = 4,  // of a head
    parameter int DRAIN = KW < 16 ? 1 : KW / 16,
    parameter int PLACES = $clog2(KW / DRAIN)
) (
    input logic clk,
    input logic valid,
    input logic first_token,
    input logic [1:0] chunk,
    input logic signed [31:0] score,
    input logic signed [31:0] largest,
    input logic [15:0] scale,  // exponent, mantissa
    input logic [KW*8-1:0] codes10,  // 10 cycles after `valid`
    output logic [31:0] total,
    input logic [5:0] drain_index,  // word / DRAIN
    output logic [DRAIN*48-1:0] drain  // three cycles later
);
`include "tables.svh"
  logic [15:0] values[0:255];
  logic [7:0] falls[0:255];  // to the next value
  initial
    for (int i = 0; i < 256; i++) begin
      values[i] = EXP2[i*16+:16];
      falls[i] = EXP2_FALLS[i*16+:8];
    end

  logic [10:1] valids, firsts;
  logic [19:0] chunks;
  logic [8*16-1:0] scales;
  logic [31:0] score1, distance2;
  logic [15:0] from3, whole3, from4, whole4, from5, whole5, value6, whole6, probability7;
  logic [7:0] fall3, fall4, rest3, rest4;
  logic [15:0] drop5;
  logic [27:0] product8;
  logic [3:0] exponent8;
  logic [42:0] shifted9;
  logic [26:0] weight10;
  always_ff @(posedge clk) begin
    valids <= {valids[9:1], valid};
    firsts <= {firsts[9:1], first_token};
    chunks <= {chunks[17:0], chunk};
    scales <= {scales[7*16-1:0], scale};
    if (valid) score1 <= score;
    distance2 <= largest - score1;
    from3 <= values[distance2[15:8]];
    fall3 <= falls[distance2[15:8]];
    rest3 <= distance2[7:0];
    whole3 <= distance2[31:16];
    // Block RAM answers late: what was read passes through a register before it is multiplied.
    {from4, fall4, rest4, whole4} <= {from3, fall3, rest3, whole3};
    drop5 <= 16'(fall4) * 16'(rest4);
    {from5, whole5} <= {from4, whole4};
    value6 <= from5 - 16'(drop5[15:8]);
    whole6 <= whole5;
    probability7 <= whole6 > 16'd15 ? 16'd0 : value6 >> whole6[3:0];
    product8 <= 28'(probability7) * 28'(scales[6*16+:12]);
    exponent8 <= scales[6*16+12+:4];
    if (valids[7] && chunks[13:12] == 0) total <= (firsts[7] ? 32'd0 : total) + 32'(probability7);
    shifted9 <= 43'(product8) << exponent8;
    weight10 <= 27'((shifted9 + 43'd65536) >> 17);
  end

  logic [KW*48-1:0] sums;
  logic [1:0] chunk10;
  logic [PLACES-1:0] drain_word1, drain_word2;
  assign chunk10 = valids[10] ? chunks[19:18] : 2'(drain_index >> PLACES);
  for (genvar l = 0; l < KW; l++) begin : g_lane
    value_lane #(
        .CHUNKS(CHUNKS)
    ) lane (
        .clk, .valid(valids[10]), .first(firsts[10]), .chunk(chunk10), .weight(weight10), .code(codes10[l*8+:8]),
        .sum(sums[l*48+:48])
    );
  end
  always_ff @(posedge clk) begin
    drain_word1 <= drain_index[PLACES-1:0];
    drain_word2 <= drain_word1;
    drain <= sums[drain_word2*(DRAIN*48)+:DRAIN*48];
  end
endmodule

// Weight times code, added to the sum of its chunk; two cycles later `sum` is that of `chunk`.
module value_lane #(
    parameter int CHUNKS = 4
) (
    input logic clk,
    input logic valid,
    input logic first,
    input logic [1:0] chunk,
    input logic [26:0] weight,
    input logic [7:0] code,
    output logic [47:0] sum
);
  logic signed [34:0] product;
  // Each lane has its own: too much hangs on them.
  (* keep *) logic valid1, first1, valid2, first2;
`ifdef USE_TREE
  // Multipliers of 18 bits: two, and their sum.
  logic signed [20:0] low1, high1;
  always_ff @(posedge clk) begin
    if (valid) begin
      low1 <= $signed({1'b0, weight[12:0]}) * $signed(code);
      high1 <= $signed({1'b0, weight[25:13]}) * $signed(code);
    end
    product <= 35'(low1) + {high1[20], high1, 13'b0};
  end
`else
  logic signed [34:0] product1;
  always_ff @(posedge clk) begin
    if (valid) product1 <= $signed({1'b0, weight[25:0]}) * $signed(code);
    product <= product1;
  end
`endif
  logic [47:0] next;
  assign next = (first2 ? 48'sd0 : $signed(sum)) + 48'(product);
  always_ff @(posedge clk) begin
    {valid2, valid1} <= {valid1, valid};
    {first2, first1} <= {first1, first};
  end
  if (CHUNKS == 1) begin : g_one
    always_ff @(posedge clk) if (valid2) sum <= next;
  end else begin : g_each
    logic [47:0] sums[0:CHUNKS-1];
    (* keep *) logic [1:0] chunk1, chunk2;
    assign sum = sums[chunk2];
    always_ff @(posedge clk) begin
      {chunk2, chunk1} <= {chunk1, chunk};
      if (valid2) sums[chunk2] <= next;
    end
  end
endmodule
