// First-word-fall-through FIFO whose memory is read with a register, as block RAM is.
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
  logic [WIDTH-1:0] mem[0:(1<<DEPTH_LOG2)-1];
  logic [DEPTH_LOG2:0] head, tail, next_head;
  assign next_head = head + {{DEPTH_LOG2{1'b0}}, pop};
  always_ff @(posedge clk) begin
    if (push) mem[tail[DEPTH_LOG2-1:0]] <= in;
    out <= mem[next_head[DEPTH_LOG2-1:0]];
    // A beat that is written in this cycle is not yet readable.
    valid <= !rst && (next_head != tail);
    head <= rst ? '0 : next_head;
    tail <= rst ? '0 : tail + {{DEPTH_LOG2{1'b0}}, push};
  end
endmodule
