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
  logic [3:0] left;
  logic running;
  assign less = rest - {2'b0, below};
  always_ff @(posedge clk) begin
    done <= 1'b0;
    if (rst) running <= 1'b0;
    else if (start) begin
      rest <= {2'b0, numerator};
      below <= denominator;
      left <= 4'd15;
      running <= 1'b1;
    end else if (running) begin
      quotient <= {quotient[14:0], !less[17]};
      rest <= less[17] ? {rest[16:0], 1'b0} : {less[16:0], 1'b0};
      left <= left - 4'd1;
      running <= left != 0;
      done <= left == 0;
    end
  end
endmodule
