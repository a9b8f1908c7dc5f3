// A memory with one write port and one read port with a register, as block RAM is. What is read at an address while
// that is written is never used.
module ram #(
    parameter int WIDTH = 32,
    parameter int DEPTH_LOG2 = 8
) (
    input logic clk,
    input logic read,
    input logic [DEPTH_LOG2-1:0] read_address,
    output logic [WIDTH-1:0] out,
    input logic write,
    input logic [DEPTH_LOG2-1:0] write_address,
`ifdef PROBE
    input logic [DEPTH_LOG2-1:0] probe_address,
    output logic [WIDTH-1:0] probe,
`endif
    input logic [WIDTH-1:0] in
);
  (* no_rw_check *) logic [WIDTH-1:0] mem[0:(1<<DEPTH_LOG2)-1];
  always_ff @(posedge clk) begin
    if (read) out <= mem[read_address];
    if (write) mem[write_address] <= in;
  end
`ifdef PROBE
  assign probe = mem[probe_address];
`endif
endmodule
