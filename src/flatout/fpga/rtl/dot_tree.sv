// Two rows of KW weights times KW activations with a register after every step: log2(KW) + 3 cycles. For devices
// without the DSP48E2 that mac_chain.sv is made of: products of 8 bits are sums in logic, because such a device has few
// multipliers, and far from each other. The upper row is one of 4-bit weights or nothing.
module dot_tree #(
    parameter int KW = 16
) (
    input logic clk,
    input logic [KW*8-1:0] low,
    input logic [KW*8-1:0] high,
    input logic [KW*8-1:0] activation,
    output logic signed [21:0] low_sum,
    output logic signed [21:0] high_sum
);
  localparam int WIDTH = 15 + $clog2(KW);  // of KW products of numbers in [-127, 127]
  logic [KW*8-1:0] low1, high1, activation1;
  logic [KW*WIDTH-1:0] low3, high3;
  logic signed [WIDTH-1:0] low_total, high_total;
  always_ff @(posedge clk) begin
    low1 <= low;
    high1 <= high;
    activation1 <= activation;
  end
  for (genvar i = 0; i < KW; i++) begin : g_product
    logic_product #(.WIDTH(WIDTH)) low_product (
        .clk, .a(low1[i*8+:8]), .b(activation1[i*8+:8]), .product(low3[i*WIDTH+:WIDTH])
    );
    nibble_product #(.WIDTH(WIDTH)) high_product (
        .clk, .a(activation1[i*8+:8]), .b(high1[i*8+:4]), .product(high3[i*WIDTH+:WIDTH])
    );
  end
  sum_tree #(.N(KW), .WIDTH(WIDTH)) low_tree (.clk, .enable(1'b1), .in(low3), .sum(low_total));
  sum_tree #(.N(KW), .WIDTH(WIDTH)) high_tree (.clk, .enable(1'b1), .in(high3), .sum(high_total));
  assign low_sum = 22'(low_total);
  assign high_sum = 22'(high_total);
endmodule

// a * b, two cycles later: a times the lower half of b and times its upper half, then their sum.
module logic_product #(
    parameter int WIDTH = 22
) (
    input logic clk,
    input logic signed [7:0] a,
    input logic signed [7:0] b,
    output logic [WIDTH-1:0] product
);
  logic signed [12:0] lower, upper;
  function automatic logic signed [12:0] times(input logic signed [7:0] x, input logic bit_, input int places);
    times = bit_ ? 13'(x) <<< places : 13'sd0;
  endfunction
  always_ff @(posedge clk) begin
    lower <= (times(a, b[0], 0) + times(a, b[1], 1)) + (times(a, b[2], 2) + times(a, b[3], 3));
    upper <= (times(a, b[4], 0) + times(a, b[5], 1)) + (times(a, b[6], 2) - times(a, b[7], 3));  // b[7] is its sign
    product <= WIDTH'(lower) + (WIDTH'(upper) <<< 4);
  end
endmodule

// a * b for a b of 4 bits, two cycles later: a times the lower half of b and times its upper half, then their sum.
module nibble_product #(
    parameter int WIDTH = 22
) (
    input logic clk,
    input logic signed [7:0] a,
    input logic signed [3:0] b,
    output logic [WIDTH-1:0] product
);
  logic signed [9:0] lower, upper;
  function automatic logic signed [9:0] times(input logic signed [7:0] x, input logic bit_, input int places);
    times = bit_ ? 10'(x) <<< places : 10'sd0;
  endfunction
  always_ff @(posedge clk) begin
    lower <= times(a, b[0], 0) + times(a, b[1], 1);
    upper <= times(a, b[2], 0) - times(a, b[3], 1);  // b[3] is its sign
    product <= WIDTH'(lower) + (WIDTH'(upper) <<< 2);
  end
endmodule
