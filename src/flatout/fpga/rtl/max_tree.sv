// The largest size of N signed words: a cycle for their sizes, then log2(N).
module max_tree #(
    parameter int N = 32
) (
    input logic clk,
    input logic enable,
    input logic [N*32-1:0] words,
    output logic [31:0] largest
);
  logic [(2*N-1)*32-1:0] node;  // a heap: node 0 is the largest, the last N are the sizes
  for (genvar i = 0; i < N; i++) begin : g_size
    always_ff @(posedge clk)
      if (enable) node[(N-1+i)*32+:32] <= words[i*32+31] ? -words[i*32+:32] : words[i*32+:32];
  end
  for (genvar i = 0; i < N - 1; i++) begin : g_node
    logic [31:0] left, right;
    assign left = node[(2*i+1)*32+:32];
    assign right = node[(2*i+2)*32+:32];
    always_ff @(posedge clk) if (enable) node[i*32+:32] <= right < left ? left : right;  // `<` is one carry chain
  end
  assign largest = node[31:0];
endmodule
