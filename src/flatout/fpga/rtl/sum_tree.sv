// The sum of N numbers, added in pairs with a register after each: log2(N) cycles.
module sum_tree #(
    parameter int N = 32,
    parameter int WIDTH = 64
) (
    input logic clk,
    input logic enable,
    input logic [N*WIDTH-1:0] in,
    output logic [WIDTH-1:0] sum
);
  logic [(2*N-1)*WIDTH-1:0] node;  // a heap: node 0 is the sum, the last N are the numbers
  always_comb node[(N-1)*WIDTH+:N*WIDTH] = in;
  for (genvar i = 0; i < N - 1; i++) begin : g_node
    always_ff @(posedge clk)
      if (enable) node[i*WIDTH+:WIDTH] <= node[(2*i+1)*WIDTH+:WIDTH] + node[(2*i+2)*WIDTH+:WIDTH];
  end
  assign sum = node[WIDTH-1:0];
endmodule
