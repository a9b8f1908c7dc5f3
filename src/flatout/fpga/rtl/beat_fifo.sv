// First-word-fall-through FIFO. What block RAM reads passes through one more register, because it comes late in the cycle.
module beat_fifo #(
    parameter int WIDTH = 512,
    parameter int DEPTH_LOG2 = 9
) (
    input  logic clk,
    input  logic rst,
    input  logic push,
    input  logic [WIDTH-1:0] in,
    output logic valid,
    input  logic pop,
    output logic [WIDTH-1:0] out
);
  logic [WIDTH-1:0] next;
  logic next_valid, advance, refill, some;
  logic [DEPTH_LOG2:0] head, tail;
  assign advance = pop || !valid;
  assign refill = advance || !next_valid;
  assign some = head != tail;
  ram #(
      .WIDTH(WIDTH), .DEPTH_LOG2(DEPTH_LOG2)
  ) beats (
      .clk, .read(refill), .read_address(head[DEPTH_LOG2-1:0]), .out(next),
      .write(push), .write_address(tail[DEPTH_LOG2-1:0]),
`ifdef PROBE
      .probe_address('0), .probe(),
`endif
      .in
  );
  always_ff @(posedge clk) begin
    if (advance) begin
      out <= next;
      valid <= next_valid;
    end
    if (refill) begin
      next_valid <= some;
      head <= head + {{DEPTH_LOG2{1'b0}}, some};
    end
    tail <= tail + {{DEPTH_LOG2{1'b0}}, push};
    if (rst) begin
      valid <= 1'b0;
      next_valid <= 1'b0;
      head <= '0;
      tail <= '0;
    end
  end
endmodule
