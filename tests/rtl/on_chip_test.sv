// Gives on_chip its first token and then back whatever it answers, ANSWERS times.
module on_chip_test #(
    parameter int FIRST = 5,
    parameter int ANSWERS = 8
);
  logic clk = 0, rst = 1, ready, token_valid = 0, next_valid;
  logic [15:0] token = 16'(FIRST), next;
  int answers = 0;
  always #5 clk = !clk;
  on_chip chip (.*);
  initial begin
    repeat (4) @(negedge clk);
    rst = 0;
    while (answers < ANSWERS) begin
      @(negedge clk);
      token_valid = ready;
      if (next_valid) begin
        $display("next %0d", next);
        token = next;
        answers = answers + 1;
      end
    end
    $finish;
  end
endmodule
