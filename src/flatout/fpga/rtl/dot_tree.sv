// Two rows of KW weights times KW activations with a register after every step: log2(KW) + 2 cycles. For devices
// without the DSP48E2 that mac_chain.sv is made of.
module dot_tree #(
    parameter int KW = 16
) (
    input logic clk,
    input logic [KW*8-1:0] low,
    input logic [KW*8-1:0] high,
    input logic [KW*8-1:0] activation,
    output logic [21:0] low_sum,
    output logic [21:0] high_sum
);
  logic [KW*8-1:0] low1, high1, activation1;
  logic [KW*22-1:0] low2, high2;
  always_ff @(posedge clk) begin
    low1 <= low;
    high1 <= high;
    activation1 <= activation;
  end
  for (genvar i = 0; i < KW; i++) begin : g_product
    always_ff @(posedge clk) begin
      low2[i*22+:22] <= 22'($signed(low1[i*8+:8]) * $signed(activation1[i*8+:8]));
      high2[i*22+:22] <= 22'($signed(high1[i*8+:8]) * $signed(activation1[i*8+:8]));
    end
  end
  sum_tree #(.N(KW), .WIDTH(22)) low_tree (.clk, .enable(1'b1), .in(low2), .sum(low_sum));
  sum_tree #(.N(KW), .WIDTH(22)) high_tree (.clk, .enable(1'b1), .in(high2), .sum(high_sum));
endmodule
