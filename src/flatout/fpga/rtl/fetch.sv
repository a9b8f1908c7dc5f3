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
  typedef enum logic [3:0] {IDLE, LOAD, READ, DECODE, RUN, MULTIPLY, JOIN, ADDRESS, LENGTH, ISSUE, NEXT} state_t;
  state_t state;
  logic [63:0] now;
  logic [27:0] gemv_beats, left;
  logic [2:0] head_chunks;
  logic [7:0] block_beats, kv_heads, head;
  logic [31:0] head_stride, value_offset, head_start, factor, product;
  logic [24:0] low, high;
  logic popped1;
  logic [8:0] times;
  logic [10:0] place;
  logic [CB-1:0] token;
  logic value;
  logic [FIFO_LOG2:0] room;
  logic [BURST_LOG2:0] to_boundary, length;
  logic last_burst;
  logic [3:0] op;
  logic last_token;
  assign op = now[63:60];
  assign to_boundary = (BURST_LOG2 + 1)'(1 << BURST_LOG2) - {1'b0, address[BURST_LOG2-1:0]};
  assign request = state == ISSUE && room >= (FIFO_LOG2 + 1)'(length);
  assign beats = length;
  assign last_token = {1'b0, token} + 1'b1 == count;

  always_ff @(posedge clk) begin
    popped1 <= popped && !rst;
    room <= room + (FIFO_LOG2 + 1)'(popped1) - (request && request_ready ? (FIFO_LOG2 + 1)'(length) : '0);
    case (state)
      IDLE:
      if (start) begin
        pc <= '0;
        state <= LOAD;
      end
      LOAD: state <= READ;  // the program memory's cycle
      READ: begin
        now <= instruction;
        state <= DECODE;
      end
      DECODE: begin
        token <= '0;
        head <= '0;
        value <= 1'b0;
        head_start <= now[31:0];
        state <= NEXT;
        case (op)
          OP_SET: begin
            if (now[59:56] == SET_HEADS) begin
              head_chunks <= now[2:0];
              block_beats <= now[15:8];
              kv_heads <= now[31:24];
            end
            if (now[59:56] == SET_HEAD_STRIDE) head_stride <= now[31:0];
            if (now[59:56] == SET_VALUE_OFFSET) value_offset <= now[31:0];
          end
          OP_MODE: gemv_beats <= now[27:0];
          OP_END: state <= IDLE;
          OP_EMBED, OP_TURNS, OP_NORM, OP_GEMV, OP_ATTEND: state <= RUN;
          default: ;
        endcase
      end
      // One run of beats: the two factors of its address or length, their product in two
      // parts and whole, address and length.
      RUN: begin
        times <= op == OP_EMBED ? {1'b0, now[39:32]} : op == OP_TURNS ? {5'b0, head_chunks, 1'b0} : {1'b0, block_beats} + 9'd1;
        factor <= op == OP_EMBED ? tokens[token*32+:32] : op == OP_TURNS ? position + 32'(token) : 32'(block[token*24+:24]);
        place <= 11'(9'(offset[token*8+:8]) + 9'd1);
        if (op != OP_ATTEND || (fence_open && fence_pc == pc)) state <= MULTIPLY;
      end
      MULTIPLY: begin
        low <= factor[15:0] * times;
        high <= factor[31:16] * times;
        place <= 11'(place * head_chunks);
        state <= JOIN;
      end
      JOIN: begin
        product <= 32'(low) + {high[15:0], 16'b0};
        state <= ADDRESS;
      end
      ADDRESS: begin
        address <= op == OP_EMBED || op == OP_TURNS ? head_start + product
                 : op == OP_ATTEND && value ? head_start + value_offset : head_start;
        left <= op == OP_EMBED || op == OP_NORM ? 28'(now[39:32]) : op == OP_TURNS ? 28'({head_chunks, 1'b0})
              : op == OP_GEMV ? gemv_beats : product[27:0] + 28'(place) + 28'd1;
        state <= LENGTH;
      end
      LENGTH: begin
        length <= left < 28'(to_boundary) ? left[BURST_LOG2:0] : to_boundary;
        last_burst <= !(28'(to_boundary) < left);
        state <= ISSUE;
      end
      ISSUE:
      if (request && request_ready) begin
        address <= address + 32'(length);
        left <= left - 28'(length);
        state <= LENGTH;
        if (last_burst) begin
          state <= NEXT;
          if (op == OP_ATTEND) begin
            value <= !value;
            if (value) begin
              token <= last_token ? '0 : token + 1'b1;
              if (last_token) begin
                head <= head + 8'd1;
                head_start <= head_start + head_stride;
              end
            end
            if (!(value && last_token && head + 8'd1 == kv_heads)) state <= RUN;
          end
          if ((op == OP_EMBED || op == OP_TURNS) && !last_token) begin
            token <= token + 1'b1;
            state <= RUN;
          end
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
