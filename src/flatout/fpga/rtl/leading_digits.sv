// Binary digits of x, a cycle later.
module leading_digits (
    input logic clk,
    input logic [63:0] x,
    output logic [6:0] digits
);
  logic [7:0] some;
  logic [31:0] inner;  // digits of each byte
  function automatic logic [3:0] of_byte(input logic [7:0] y);
    of_byte = '0;
    for (int i = 0; i < 8; i++) if (y[i]) of_byte = 4'(i + 1);
  endfunction
  always_ff @(posedge clk)
    for (int b = 0; b < 8; b++) begin
      some[b] <= x[b*8+:8] != 0;
      inner[b*4+:4] <= of_byte(x[b*8+:8]);
    end
  always_comb begin
    digits = '0;
    for (int b = 0; b < 8; b++) if (some[b]) digits = 7'(b * 8) + 7'(inner[b*4+:4]);
  end
endmodule
