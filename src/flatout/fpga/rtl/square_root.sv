// root = floor(sqrt(square)): one bit a cycle, 16 cycles.
module square_root (
    input  logic clk,
    input  logic rst,
    input  logic start,
    input  logic [31:0] square,
    output logic done,  // for one cycle
    output logic [15:0] root
);
  logic [31:0] digits;
  logic [17:0] rest, trial, less;
  logic [4:0] left;
  assign trial = {rest[15:0], digits[31:30]};
  assign less = trial - {root, 2'b01};
  always_ff @(posedge clk) begin
    done <= 1'b0;
    if (rst) left <= '0;
    else if (start) begin
      digits <= square;
      rest <= '0;
      root <= '0;
      left <= 5'd16;
    end else if (left != 0) begin
      digits <= {digits[29:0], 2'b0};
      // The remainder never exceeds 2 * root, 17 bits: a borrow shows in bit 17 unless trial has it set.
      rest <= (trial >= {root, 2'b01}) ? less : trial;
      root <= {root[14:0], trial >= {root, 2'b01}};
      left <= left - 5'd1;
      done <= left == 5'd1;
    end
  end
endmodule
