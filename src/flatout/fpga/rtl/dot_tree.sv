// Two rows of KW weights times KW activations with a register after every step: log2(KW) + 3 cycles. For devices
// without the DSP48E2 that mac_chain.sv is made of: products of 8 bits are sums in logic, because such a device has few
// multipliers, and far from each other.
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
  logic [KW*22-1:0] low3, high3;
  always_ff @(posedge clk) begin
    low1 <= low;
    high1 <= high;
    activation1 <= activation;
  end
  for (genvar i = 0; i < KW; i++) begin : g_product
    logic_product low_product (
        .clk, .a(low1[i*8+:8]), .b(activation1[i*8+:8]), .product(low3[i*22+:22])
    );
    logic_product high_product (
        .clk, .a(high1[i*8+:8]), .b(activation1[i*8+:8]), .product(high3[i*22+:22])
    );
  end
  sum_tree #(.N(KW), .WIDTH(22)) low_tree (.clk, .enable(1'b1), .in(low3), .sum(low_sum));
  sum_tree #(.N(KW), .WIDTH(22)) high_tree (.clk, .enable(1'b1), .in(high3), .sum(high_sum));
endmodule

// a * b, two cycles later: a times the lower half of b and times its upper half, then their sum.
module logic_product (
    input logic clk,
    input logic signed [7:0] a,
    input logic signed [7:0] b,
    output logic [21:0] product
);
  logic signed [12:0] lower, upper;
  function automatic logic signed [12:0] times(input logic signed [7:0] x, input logic bit_, input int places);
    times = bit_ ? 13'(x) <<< places : 13'sd0;
  endfunction
  always_ff @(posedge clk) begin
    lower <= (times(a, b[0], 0) + times(a, b[1], 1)) + (times(a, b[2], 2) + times(a, b[3], 3));
    upper <= (times(a, b[4], 0) + times(a, b[5], 1)) + (times(a, b[6], 2) - times(a, b[7], 3));  // b[7] is its sign
    product <= 22'(lower) + (22'(upper) <<< 4);
  end
endmodule
