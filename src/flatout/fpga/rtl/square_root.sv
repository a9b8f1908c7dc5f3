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
  logic [3:0] left;
  logic running, fits;
  assign trial = {rest[15:0], digits[31:30]};
  assign less = trial - {root, 2'b01};
  assign fits = !(trial < {root, 2'b01});
  always_ff @(posedge clk) begin
    done <= 1'b0;
    if (rst) running <= 1'b0;
    else if (start) begin
      digits <= square;
      rest <= '0;
      root <= '0;
      left <= 4'd15;
      running <= 1'b1;
    end else if (running) begin
      digits <= {digits[29:0], 2'b0};
      // The remainder never exceeds 2 * root, 17 bits: a borrow shows in bit 17 unless trial has it set.
      rest <= fits ? less : trial;
      root <= {root[14:0], fits};
      left <= left - 4'd1;
      running <= left != 0;
      done <= left == 0;
    end
  end
endmodule
