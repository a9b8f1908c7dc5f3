// The accelerator behind AXI, for a block design in Vivado. GENERATED INPUT FOR A VENDOR FLOW: not run in Vivado, on no FPGA.
//
// Master: 512-bit bursts at `base` (a register) for beats, single writes with strobes for keys and values. Slave: 32-bit
// registers of the host at the word addresses below; driver.py uses them.
//   0 control (write 1: start; read bit 0: done)   1 count   2 position   3 base, low   4 base, high
//   5 program address   6 program, low   7 program, high (writes the instruction)
//   16+c token   32+c block   48+c offset   64+c best
module axi_top #(
    parameter int C = 4,
    parameter int CB = 2,
    parameter int PC = 10,
    parameter int BURST_LOG2 = 6
) (
    input logic clk,
    input logic rst_n,
    // registers
    input logic [8:0] s_awaddr,
    input logic s_awvalid,
    output logic s_awready,
    input logic [31:0] s_wdata,
    input logic s_wvalid,
    output logic s_wready,
    output logic [1:0] s_bresp,
    output logic s_bvalid,
    input logic s_bready,
    input logic [8:0] s_araddr,
    input logic s_arvalid,
    output logic s_arready,
    output logic [31:0] s_rdata,
    output logic [1:0] s_rresp,
    output logic s_rvalid,
    input logic s_rready,
    // memory
    output logic [63:0] m_araddr,
    output logic [7:0] m_arlen,
    output logic [2:0] m_arsize,
    output logic [1:0] m_arburst,
    output logic m_arvalid,
    input logic m_arready,
    input logic [511:0] m_rdata,
    input logic m_rvalid,
    output logic m_rready,
    output logic [63:0] m_awaddr,
    output logic [7:0] m_awlen,
    output logic [2:0] m_awsize,
    output logic [1:0] m_awburst,
    output logic m_awvalid,
    input logic m_awready,
    output logic [511:0] m_wdata,
    output logic [63:0] m_wstrb,
    output logic m_wlast,
    output logic m_wvalid,
    input logic m_wready,
    input logic m_bvalid,
    output logic m_bready
);
  logic rst, start, done, finished, program_write;
  logic [31:0] position;
  logic [63:0] base, program_data;
  logic [CB:0] count;
  logic [PC-1:0] program_address;
  logic [C*32-1:0] tokens, best;
  logic [C*24-1:0] block;
  logic [C*8-1:0] offset;
  always_ff @(posedge clk) rst <= !rst_n;

  // ---- registers: address and data are taken together
  logic write;
  logic [6:0] to, from;
  assign write = s_awvalid && s_wvalid && !s_bvalid;
  assign s_awready = write;
  assign s_wready = write;
  assign s_bresp = 2'b00;
  assign s_rresp = 2'b00;
  assign s_arready = s_arvalid && !s_rvalid;
  assign to = s_awaddr[8:2];
  assign from = s_araddr[8:2];
  always_ff @(posedge clk) begin
    start <= 1'b0;
    program_write <= 1'b0;
    if (done) finished <= 1'b1;
    if (write) begin
      s_bvalid <= 1'b1;
      case (to)
        7'd0: begin
          start <= s_wdata[0];
          finished <= 1'b0;
        end
        7'd1: count <= s_wdata[CB:0];
        7'd2: position <= s_wdata;
        7'd3: base[31:0] <= s_wdata;
        7'd4: base[63:32] <= s_wdata;
        7'd5: program_address <= s_wdata[PC-1:0];
        7'd6: program_data[31:0] <= s_wdata;
        7'd7: begin
          program_data[63:32] <= s_wdata;
          program_write <= 1'b1;
        end
        default: ;
      endcase
      for (int c = 0; c < C; c++) begin
        if (to == 7'(16 + c)) tokens[c*32+:32] <= s_wdata;
        if (to == 7'(32 + c)) block[c*24+:24] <= s_wdata[23:0];
        if (to == 7'(48 + c)) offset[c*8+:8] <= s_wdata[7:0];
      end
    end else if (s_bready) s_bvalid <= 1'b0;
    if (s_arvalid && s_arready) begin
      s_rvalid <= 1'b1;
      s_rdata <= {31'b0, finished};
      for (int c = 0; c < C; c++) if (from == 7'(64 + c)) s_rdata <= best[c*32+:32];
    end else if (s_rready) s_rvalid <= 1'b0;
    if (rst) begin
      s_bvalid <= 1'b0;
      s_rvalid <= 1'b0;
      finished <= 1'b0;
      start <= 1'b0;
      program_write <= 1'b0;
    end
  end

  // ---- memory: address and data of a write are held until each is taken
  logic request, store, store_ready, store_done;
  logic [31:0] request_address, store_address;
  logic [BURST_LOG2:0] request_beats;
  assign m_araddr = base + {26'b0, request_address, 6'b0};
  assign m_arlen = 8'(request_beats - 1'b1);
  assign m_arsize = 3'd6;
  assign m_arburst = 2'b01;
  assign m_arvalid = request;
  assign m_rready = 1'b1;  // room was kept before the request
  assign m_awlen = 8'd0;
  assign m_awsize = 3'd6;
  assign m_awburst = 2'b01;
  assign m_wlast = 1'b1;
  assign m_bready = 1'b1;
  assign store_done = m_bvalid;
  assign store_ready = !m_awvalid && !m_wvalid;
  logic [511:0] store_data;
  logic [63:0] store_strobe;
  always_ff @(posedge clk) begin
    if (store && store_ready) begin
      m_awaddr <= base + {26'b0, store_address, 6'b0};
      m_wdata <= store_data;
      m_wstrb <= store_strobe;
      m_awvalid <= 1'b1;
      m_wvalid <= 1'b1;
    end else begin
      if (m_awready) m_awvalid <= 1'b0;
      if (m_wready) m_wvalid <= 1'b0;
    end
    if (rst) begin
      m_awvalid <= 1'b0;
      m_wvalid <= 1'b0;
    end
  end

  accelerator #(
      .KW(64), .C(C), .CB(CB), .PC(PC), .BURST_LOG2(BURST_LOG2)
  ) core (
      .clk, .rst, .program_write, .program_address, .program_data, .start, .count, .tokens, .position, .block, .offset,
      .done, .best, .logit_valid(), .logit_pair(), .logit_index(), .logits(), .request, .request_ready(m_arready),
      .request_address, .request_beats, .beat_valid(m_rvalid), .beat_data(m_rdata), .store, .store_ready, .store_address,
      .store_strobe, .store_data, .store_done, .running_pc(), .consuming()
  );
endmodule
