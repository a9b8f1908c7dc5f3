// quotient = floor(numerator * 2**15 / denominator), denominator in [2**15, 2**16): one bit a cycle, 16 cycles.
module divide (
    input  logic clk,
    input  logic rst,
    input  logic start,
    input  logic [15:0] numerator,
    input  logic [15:0] denominator,
    output logic done,  // for one cycle
    output logic [15:0] quotient
);
  logic [17:0] rest, less;
  logic [15:0] below;
  logic [4:0] left;
  assign less = rest - {2'b0, below};
  always_ff @(posedge clk) begin
    done <= 1'b0;
    if (rst) left <= '0;
    else if (start) begin
      rest <= {2'b0, numerator};
      below <= denominator;
      left <= 5'd16;
    end else if (left != 0) begin
      quotient <= {quotient[14:0], !less[17]};
      rest <= less[17] ? {rest[16:0], 1'b0} : {less[16:0], 1'b0};
      left <= left - 5'd1;
      done <= left == 5'd1;
    end
  end
endmodule
