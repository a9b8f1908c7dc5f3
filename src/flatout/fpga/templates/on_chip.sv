// A whole model in one chip: the accelerator, its memory in block RAM and a host of a few registers, for one column.
// A token goes in, the token with the largest logit comes out; the sequence starts anew with a reset.
//
// The memory is two: what does not change, and keys and values, which are written by bytes. fpga/chip.py makes the files.
// What block RAM reads passes through a register first, because it comes late in the cycle.
module on_chip #(
    parameter int KW = 16,
    parameter int PC = 7,
    parameter int ROWS_LOG2 = 7,
    parameter int CODES_LOG2 = 5,
    parameter int CONTEXT_LOG2 = 6,
    parameter int FIFO_LOG2 = 6,
    parameter int BURST_LOG2 = 4,
    parameter int HEADS_LOG2 = 3,
    parameter int INSTRUCTIONS = 64,
    parameter int FIXED = 4096,  // beats of weights, tables and embeddings
    parameter int CACHE_LOG2 = 10,  // beats of keys and values
    parameter int BLOCK_TOKENS = 8,
    parameter int CONTEXT = 40
) (
    input logic clk,
    input logic rst,
    output logic ready,
    input logic token_valid,
    input logic [15:0] token,
    output logic next_valid,  // for one cycle
    output logic [15:0] next
);
  localparam int BITS = KW * 8;

  // ---- the program goes into the accelerator first
  logic [63:0] instructions[0:INSTRUCTIONS-1];
  initial $readmemh("program.hex", instructions);
  logic [PC-1:0] loading, program_address;
  logic loaded, program_write;
  logic [63:0] program_data;
  always_ff @(posedge clk) begin
    program_data <= instructions[loading];
    program_address <= loading;
    program_write <= !loaded && !rst;
    if (!loaded) loading <= loading + 1'b1;
    if (loading == PC'(INSTRUCTIONS - 1)) loaded <= 1'b1;
    if (rst) begin
      loading <= '0;
      loaded <= 1'b0;
    end
  end

  // ---- one token after the other
  logic start, done, running;
  logic [31:0] position, best;
  logic [23:0] block;
  logic [7:0] offset;
  logic [15:0] token_held;
  assign ready = loaded && !running && !start && position != CONTEXT;
  always_ff @(posedge clk) begin
    start <= ready && token_valid;
    if (ready && token_valid) begin
      token_held <= token;
      running <= 1'b1;
    end
    next_valid <= done && running;
    if (done) begin
      next <= best[15:0];
      running <= 1'b0;
      position <= position + 32'd1;
      offset <= offset + 8'd1 == 8'(BLOCK_TOKENS) ? 8'd0 : offset + 8'd1;
      if (offset + 8'd1 == 8'(BLOCK_TOKENS)) block <= block + 24'd1;
    end
    if (rst) begin
      start <= 1'b0;
      running <= 1'b0;
      next_valid <= 1'b0;
      position <= '0;
      block <= '0;
      offset <= '0;
    end
  end

  // ---- memory: a beat a cycle, four registers after its address
  logic request, request_ready, store, store_done, beat_valid;
  logic [31:0] request_address, store_address;
  logic [BURST_LOG2:0] request_beats, left;
  logic [BITS-1:0] store_data, beat_data, fixed2, fixed3, cache2, cache3;
  logic [KW-1:0] store_strobe, strobe1;
  logic [15:0] address, address1, fixed1, store_at;
  logic [3:0] valid;
  logic [3:1] from_cache;
  logic [BITS-1:0] store1;
  // One block RAM is 16,384 bits in a column: with a memory for each bit of a beat nothing has to be picked from what is read.
  for (genvar i = 0; i < BITS; i++) begin : g_bit
    localparam logic [7:0] FIRST = 8'd97 + i / 16, SECOND = 8'd97 + i % 16;
    (* ram_style = "block" *) logic bits[0:FIXED-1];
    initial $readmemh({"fixed_", FIRST, SECOND, ".hex"}, bits);
    always_ff @(posedge clk) fixed2[i] <= bits[fixed1[$clog2(FIXED)-1:0]];
  end
  always_ff @(posedge clk) fixed3 <= fixed2;
  assign request_ready = left == 0;
  always_ff @(posedge clk) begin
    if (request && request_ready) begin
      address <= request_address[15:0];
      left <= request_beats;
    end else if (left != 0) begin
      address <= address + 16'd1;
      left <= left - 1'b1;
    end
    address1 <= address - 16'(FIXED);
    fixed1 <= address;
    cache3 <= cache2;
    valid <= rst ? '0 : {valid[2:0], left != 0};
    from_cache <= {from_cache[2:1], address >= 16'(FIXED)};
    beat_data <= from_cache[3] ? cache3 : fixed3;
    store_at <= store_address[15:0] - 16'(FIXED);
    store1 <= store_data;
    strobe1 <= store && !rst ? store_strobe : '0;
    store_done <= store && !rst;
    if (rst) left <= '0;
  end
  assign beat_valid = valid[3];
  for (genvar i = 0; i < KW; i++) begin : g_byte
    ram #(
        .WIDTH(8), .DEPTH_LOG2(CACHE_LOG2)
    ) bytes (
        .clk, .read(1'b1), .read_address(address1[CACHE_LOG2-1:0]), .out(cache2[i*8+:8]), .write(strobe1[i]),
        .write_address(store_at[CACHE_LOG2-1:0]), .in(store1[i*8+:8])
    );
  end

  accelerator #(
      .KW(KW), .C(1), .CB(1), .PC(PC), .ROWS_LOG2(ROWS_LOG2), .CODES_LOG2(CODES_LOG2), .CONTEXT_LOG2(CONTEXT_LOG2),
      .FIFO_LOG2(FIFO_LOG2), .BURST_LOG2(BURST_LOG2), .HEADS_LOG2(HEADS_LOG2)
  ) core (
      .clk, .rst, .program_write, .program_address, .program_data, .start, .count(2'd1), .tokens({16'b0, token_held}),
      .position, .block, .offset, .done, .best, .logit_valid(), .logit_pair(), .logit_index(), .logits(),
      .request, .request_ready, .request_address, .request_beats, .beat_valid, .beat_data,
      .store, .store_ready(1'b1), .store_address, .store_strobe, .store_data, .store_done,
      .running_pc(), .consuming()
  );
endmodule
