// Reads the program and says what every other part does: one instruction after the other.
module sequencer #(
    parameter int KW = 64,
    parameter int C = 4,
    parameter int CB = 2,
    parameter int PC = 10,
    parameter int ROWS_LOG2 = 8,
    parameter int CODES_LOG2 = 6,
    parameter int HEADS_LOG2 = 5
) (
    input logic clk,
    input logic rst,
    // program memory, which the fetcher reads too
    input logic program_write,
    input logic [PC-1:0] program_address,
    input logic [63:0] program_data,
    input logic [PC-1:0] fetch_pc,
    output logic [63:0] fetched,
    // a pass
    input logic start,
    input logic [CB:0] count,
    input logic [31:0] position,
    output logic done,
    output logic [PC-1:0] pc,
    output logic [63:0] now,  // the instruction
    // settings
    output logic [2:0] head_chunks,
    output logic [7:0] block_beats,
    output logic [7:0] kv_heads,
    output logic [7:0] query_heads,
    output logic [7:0] group_heads,
    output logic [31:0] head_stride,
    output logic [31:0] value_offset,
    output logic [31:0] epsilon,
    output logic [15:0] code_factor,
    output logic [15:0] norm_factor,
    output logic [15:0] score_factor,
    output logic [7:0] score_shift,
    output logic [ROWS_LOG2-1:0] scratch,
    output logic [3:0] mode,
    output logic four_bits,
    output logic [7:0] mode_shift,
    output logic [ROWS_LOG2-1:0] target,
    // loads of the embedding and of the table of turns
    input logic beat_valid,
    output logic embed,
    output logic turns,
    output logic [CB-1:0] load_token,
    output logic [ROWS_LOG2-1:0] load_row,
    // vector unit
    output logic vector_start,
    input logic vector_done,
    // walker
    output logic walk_start,
    input logic walking,
    output logic [19:0] units,
    output logic [7:0] chunks,
    output logic [7:0] scale_period,
    output logic linear,
    output logic keys,
    output logic values,
    output logic [CODES_LOG2-1:0] activation_base,
    // attention
    output logic [CB-1:0] token,
    output logic [HEADS_LOG2-1:0] first_query,  // of the key head
    output logic [10:0] first_chunk,  // and its place in what is read
    output logic finish,
    input logic drained,
    input logic stores_open,  // keys or values are on their way to the memory
    output logic fence_open
);
`include "isa.svh"
  typedef enum logic [3:0] {
    IDLE, LOAD, READ, DECODE, EMBED, TURNS, VECTOR, GEMV, FENCE, KEYS, VALUES, READ_OUT, NEXT
  } state_t;
  // cycles after the last beat until its results are where the next step looks for them
  localparam int LINEAR_SETTLES = 32, KEYS_SETTLE = 20, VALUES_SETTLE = 9;
  state_t state;
  logic [63:0] instruction;
  ram #(
      .WIDTH(64), .DEPTH_LOG2(PC)
  ) program_here (
      .clk, .read(1'b1), .read_address(pc), .out(instruction), .write(program_write),
      .write_address(program_address),
`ifdef PROBE
      .probe_address('0), .probe(),
`endif
      .in(program_data)
  );
  ram #(
      .WIDTH(64), .DEPTH_LOG2(PC)
  ) program_ahead (
      .clk, .read(1'b1), .read_address(fetch_pc), .out(fetched), .write(program_write),
      .write_address(program_address),
`ifdef PROBE
      .probe_address('0), .probe(),
`endif
      .in(program_data)
  );

  assign embed = state == EMBED;
  assign turns = state == TURNS;
  assign linear = state == GEMV;
  assign keys = state == KEYS;
  assign values = state == VALUES;
  assign fence_open = (state == FENCE || keys || values || state == READ_OUT) && !stores_open;
  logic [7:0] head;
  logic [ROWS_LOG2-1:0] load_rows, loads_left;
  logic [CODES_LOG2-1:0] head_base;
  logic [10:0] token_chunks, group_chunks;  // chunks of all keys of a token, of all queries of a key head
  logic [19:0] visible;
  logic [5:0] settle;
  logic last_token;
  assign last_token = {1'b0, token} + 1'b1 == count;
  always_ff @(posedge clk) begin
    token_chunks <= 11'(kv_heads * head_chunks);
    group_chunks <= 11'(group_heads * head_chunks);
    visible <= 20'(position) + 20'(token) + 20'd1;
    load_rows <= now[63:60] == OP_EMBED ? now[32+:ROWS_LOG2] : ROWS_LOG2'({head_chunks, 1'b0});
  end

  always_ff @(posedge clk) begin
    done <= 1'b0;
    vector_start <= 1'b0;
    walk_start <= 1'b0;
    finish <= 1'b0;
    settle <= walk_start || walking ? '0 : settle + 1'b1;
    case (state)
      IDLE:
      if (start) begin
        pc <= '0;
        state <= LOAD;
      end
      LOAD: state <= READ;
      READ: begin
        now <= instruction;
        state <= DECODE;
      end
      DECODE: begin
        load_token <= '0;
        load_row <= '0;
        token <= '0;
        head <= '0;
        head_base <= '0;
        activation_base <= '0;
        first_query <= '0;
        first_chunk <= '0;
        settle <= '0;
        state <= NEXT;
        case (now[63:60])
          OP_END: begin
            done <= 1'b1;
            state <= IDLE;
          end
          OP_SET:
          case (now[59:56])
            SET_HEADS: begin
              head_chunks <= now[2:0];
              block_beats <= now[15:8];
              query_heads <= now[23:16];
              kv_heads <= now[31:24];
              group_heads <= now[39:32];
              scratch <= now[40+:ROWS_LOG2];
            end
            SET_HEAD_STRIDE: head_stride <= now[31:0];
            SET_VALUE_OFFSET: value_offset <= now[31:0];
            SET_EPSILON: epsilon <= now[31:0];
            SET_FACTORS: begin
              code_factor <= now[15:0];
              norm_factor <= now[31:16];
              score_factor <= now[47:32];
              score_shift <= now[55:48];
            end
            default: ;
          endcase
          OP_MODE: begin
            target <= now[28+:ROWS_LOG2];
            mode_shift <= now[47:40];
            mode <= now[51:48];
            four_bits <= now[52];
          end
          OP_EMBED: begin
            loads_left <= now[32+:ROWS_LOG2];
            state <= EMBED;
          end
          OP_TURNS: begin
            loads_left <= ROWS_LOG2'({head_chunks, 1'b0});
            state <= TURNS;
          end
          OP_NORM, OP_CODES, OP_HEADS: begin
            vector_start <= 1'b1;
            state <= VECTOR;
          end
          OP_GEMV: begin
            walk_start <= 1'b1;
            units <= now[51:32];
            chunks <= {2'b0, now[57:52]};
            scale_period <= four_bits ? 8'(KW / 4) : 8'(KW / 2);
            state <= GEMV;
          end
          OP_ATTEND: state <= FENCE;
          default: ;
        endcase
      end
      EMBED, TURNS:
      if (beat_valid) begin
        load_row <= load_row + 1'b1;
        loads_left <= loads_left - 1'b1;
        if (loads_left == ROWS_LOG2'(1)) begin
          load_row <= '0;
          loads_left <= load_rows;
          load_token <= load_token + 1'b1;
          if ({1'b0, load_token} + 1'b1 == count) state <= NEXT;
        end
      end
      VECTOR: if (vector_done) state <= NEXT;
      GEMV: if (!walk_start && !walking && settle == 6'(LINEAR_SETTLES)) state <= NEXT;
      FENCE:
      if (!stores_open && settle != 0) begin  // by then `visible` is this token's
        walk_start <= 1'b1;
        units <= visible;
        chunks <= {5'b0, head_chunks};
        scale_period <= block_beats;
        state <= KEYS;
      end
      KEYS:
      if (!walk_start && !walking && settle == 6'(KEYS_SETTLE)) begin
        walk_start <= 1'b1;
        state <= VALUES;
      end
      VALUES:
      if (!walk_start && !walking && settle == 6'(VALUES_SETTLE)) begin
        finish <= 1'b1;
        state <= READ_OUT;
      end
      READ_OUT:
      if (drained) begin
        token <= last_token ? '0 : token + 1'b1;
        activation_base <= activation_base + CODES_LOG2'(token_chunks);
        if (last_token) begin
          head <= head + 8'd1;
          head_base <= head_base + CODES_LOG2'(head_chunks);
          activation_base <= head_base + CODES_LOG2'(head_chunks);
          first_query <= first_query + HEADS_LOG2'(group_heads);
          first_chunk <= first_chunk + group_chunks;
        end
        settle <= '0;
        state <= last_token && head + 8'd1 == kv_heads ? NEXT : FENCE;
      end
      NEXT: begin
        pc <= pc + 1'b1;
        state <= LOAD;
      end
      default: state <= IDLE;
    endcase
    if (rst) state <= IDLE;
  end
endmodule
