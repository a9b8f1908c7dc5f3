// Walks the program ahead of the sequencer and asks the memory for every beat it will need, in order, as far as the
// beat FIFO has room. At attention it waits until the keys and values of these tokens are written.
module fetch #(
    parameter int C = 4,
    parameter int CB = 2,
    parameter int PC = 10,
    parameter int FIFO_LOG2 = 9,
    parameter int BURST_LOG2 = 6
) (
    input logic clk,
    input logic rst,
    input logic start,
    input logic [CB:0] count,
    input logic [C*32-1:0] tokens,
    input logic [31:0] position,
    input logic [C*24-1:0] block,
    input logic [C*8-1:0] offset,
    output logic [PC-1:0] pc,
    input logic [63:0] instruction,  // at pc, a cycle later
    // the sequencer has reached and may read keys and values of the attention at this address
    input logic fence_open,
    input logic [PC-1:0] fence_pc,
    output logic request,
    input logic request_ready,
    output logic [31:0] address,
    output logic [BURST_LOG2:0] beats,
    input logic popped
);
`include "isa.svh"
  typedef enum logic [2:0] {IDLE, LOAD, DECODE, RUN, ISSUE, NEXT} state_t;
  state_t state;
  logic [63:0] now;
  logic [27:0] gemv_beats;
  logic [2:0] head_chunks;
  logic [7:0] block_beats, kv_heads, head;
  logic [31:0] head_stride, value_offset, head_start, start_address;
  logic [27:0] left;
  logic [CB-1:0] token;
  logic value;
  logic [FIFO_LOG2:0] room;
  logic [3:0] op;
  assign op = now[63:60];
  logic [BURST_LOG2:0] to_boundary, length;
  assign to_boundary = (BURST_LOG2 + 1)'(1 << BURST_LOG2) - {1'b0, address[BURST_LOG2-1:0]};
  assign length = left < 28'(to_boundary) ? left[BURST_LOG2:0] : to_boundary;
  assign request = state == ISSUE && room >= (FIFO_LOG2 + 1)'(length);
  assign beats = length;
  logic last_token;
  assign last_token = {1'b0, token} + 1'b1 == count;

  always_ff @(posedge clk) begin
    room <= room + (FIFO_LOG2 + 1)'(popped) - (request && request_ready ? (FIFO_LOG2 + 1)'(length) : '0);
    case (state)
      IDLE:
      if (start) begin
        pc <= '0;
        state <= LOAD;
      end
      LOAD: state <= DECODE;  // the instruction memory's cycle
      DECODE: begin
        now <= instruction;
        token <= '0;
        head <= '0;
        value <= 1'b0;
        head_start <= instruction[31:0];
        start_address <= instruction[31:0];
        state <= NEXT;
        case (instruction[63:60])
          OP_SET: begin
            if (instruction[59:56] == SET_HEADS) begin
              head_chunks <= instruction[2:0];
              block_beats <= instruction[15:8];
              kv_heads <= instruction[31:24];
            end
            if (instruction[59:56] == SET_HEAD_STRIDE) head_stride <= instruction[31:0];
            if (instruction[59:56] == SET_VALUE_OFFSET) value_offset <= instruction[31:0];
          end
          OP_MODE: gemv_beats <= instruction[27:0];
          OP_END: state <= IDLE;
          OP_EMBED, OP_TURNS, OP_NORM, OP_GEMV: state <= RUN;
          OP_ATTEND: state <= RUN;
          default: ;
        endcase
      end
      RUN: begin  // one run of beats
        case (op)
          OP_EMBED: begin
            address <= start_address + tokens[token*32+:32] * 32'(now[39:32]);
            left <= 28'(now[39:32]);
            state <= ISSUE;
          end
          OP_TURNS: begin
            address <= start_address + (position + 32'(token)) * 32'({head_chunks, 1'b0});
            left <= 28'({head_chunks, 1'b0});
            state <= ISSUE;
          end
          OP_NORM: begin
            address <= start_address;
            left <= 28'(now[39:32]);
            state <= ISSUE;
          end
          OP_GEMV: begin
            address <= start_address;
            left <= gemv_beats;
            state <= ISSUE;
          end
          default: begin
            address <= head_start + (value ? value_offset : 32'd0);
            left <= 28'(block[token*24+:24] * 24'(block_beats + 8'd1)) + 28'd1 +
                28'((offset[token*8+:8] + 8'd1) * head_chunks);
            if (fence_open && fence_pc == pc) state <= ISSUE;
          end
        endcase
      end
      ISSUE:
      if (request && request_ready) begin
        address <= address + 32'(length);
        left <= left - 28'(length);
        if (left == 28'(length)) begin
          state <= RUN;
          if (op == OP_ATTEND) begin
            value <= !value;
            if (value) begin
              token <= last_token ? '0 : token + 1'b1;
              if (last_token) begin
                head <= head + 8'd1;
                head_start <= head_start + head_stride;
                if (head + 8'd1 == kv_heads) state <= NEXT;
              end
            end
          end else if (op == OP_EMBED || op == OP_TURNS) begin
            token <= token + 1'b1;
            if (last_token) state <= NEXT;
          end else state <= NEXT;
        end
      end
      NEXT: begin
        pc <= pc + 1'b1;
        state <= LOAD;
      end
      default: state <= IDLE;
    endcase
    if (rst) begin
      state <= IDLE;
      room <= (FIFO_LOG2 + 1)'(1 << FIFO_LOG2);
    end
  end
endmodule
