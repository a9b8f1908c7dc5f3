// Two rows of KW weights times one column of KW activations, all in [-127, 127], LATENCY cycles later.
//
// With USE_DSP48E2 both rows share each multiplier: (high * 2**18 + low) * activation holds both products in one
// DSP48E2, and a cascade of eight adds them without carrying into each other (8 * 127 * 127 < 2**17). With
// USE_TREE they are products and sums with a register after each. Simulation takes a plain sum of the same latency.
module dot_pair #(
    parameter int KW = 64,
    parameter int LATENCY = 12  // 11 in the cascade, 1 in the sum of cascades
) (
    input  logic clk,
    input  logic enable,  // simulation skips idle columns
    input  logic [KW*8-1:0] low,
    input  logic [KW*8-1:0] high,
    input  logic [KW*8-1:0] activation,
    output logic signed [21:0] low_sum,
    output logic signed [21:0] high_sum
);
`ifdef USE_DSP48E2
  logic [KW/8*22-1:0] low_part, high_part;
  for (genvar i = 0; i < KW / 8; i++) begin : g_chain
    mac_chain chain (
        .clk(clk),
        .low(low[i*64+:64]),
        .high(high[i*64+:64]),
        .activation(activation[i*64+:64]),
        .low_sum(low_part[i*22+:22]),
        .high_sum(high_part[i*22+:22])
    );
  end
  logic signed [21:0] low_total, high_total;
  always_comb begin
    low_total = '0;
    high_total = '0;
    for (int i = 0; i < KW / 8; i++) begin
      low_total = low_total + $signed(low_part[i*22+:22]);
      high_total = high_total + $signed(high_part[i*22+:22]);
    end
  end
  always_ff @(posedge clk) begin
    low_sum <= low_total;
    high_sum <= high_total;
  end
`elsif USE_TREE
  localparam int WAIT = LATENCY - 3 - $clog2(KW);
  logic [43:0] sums;
  logic [WAIT*44-1:0] later;
  dot_tree #(.KW(KW)) tree (.clk, .low, .high, .activation, .low_sum(sums[21:0]), .high_sum(sums[43:22]));
  always_ff @(posedge clk) later <= (WAIT * 44)'({later, sums});
  assign {high_sum, low_sum} = later[WAIT*44-1-:44];
`else
  logic signed [21:0] low_total, high_total;
  logic [43:0] later[0:LATENCY-2];
  always_comb begin
    low_total = '0;
    high_total = '0;
    for (int i = 0; i < KW; i++) begin
      low_total = low_total + 22'($signed(low[i*8+:8]) * $signed(activation[i*8+:8]));
      high_total = high_total + 22'($signed(high[i*8+:8]) * $signed(activation[i*8+:8]));
    end
  end
  always_ff @(posedge clk) begin
    if (enable) later[0] <= {high_total, low_total};
    for (int i = 1; i < LATENCY - 1; i++) later[i] <= later[i-1];
    {high_sum, low_sum} <= later[LATENCY-2];
  end
`endif
endmodule
