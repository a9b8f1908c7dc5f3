// Two rows of KW weights times one column of KW activations, all in [-127, 127], LATENCY cycles later.
//
// Both rows share each multiplier: (high * 2**18 + low) * activation holds both products in one DSP48E2, and a
// cascade of eight adds them without carrying into each other (8 * 127 * 127 < 2**17). Eight inputs enter
// the cascade one cycle after each other. Without USE_DSP48E2 a plain sum with the same latency stands in.
module dot_pair #(
    parameter int KW = 64,
    parameter int LATENCY = 12  // 11 in the cascade, 1 in the tree
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
  logic signed [21:0] low_part[0:KW/8-1], high_part[0:KW/8-1];
  for (genvar i = 0; i < KW / 8; i++) begin : g_chain
    mac_chain chain (
        .clk(clk),
        .low(low[i*64+:64]),
        .high(high[i*64+:64]),
        .activation(activation[i*64+:64]),
        .low_sum(low_part[i]),
        .high_sum(high_part[i])
    );
  end
  logic signed [21:0] low_total, high_total;
  always_comb begin
    low_total = '0;
    high_total = '0;
    for (int i = 0; i < KW / 8; i++) begin
      low_total = low_total + low_part[i];
      high_total = high_total + high_part[i];
    end
  end
  always_ff @(posedge clk) begin
    low_sum <= low_total;
    high_sum <= high_total;
  end
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
