// Eight DSP48E2 in a cascade: two rows of eight weights times eight activations, 11 cycles later.
//
// The pre-adder joins the rows (D + A = low + high * 2**18), the multiplier takes both times the activation, and the
// cascade adds: input i enters i cycles late. low_sum borrows from high_sum when it is negative. Ports and
// attributes: AMD UG579.
module mac_chain (
    input  logic clk,
    input  logic [63:0] low,
    input  logic [63:0] high,
    input  logic [63:0] activation,
    output logic signed [21:0] low_sum,
    output logic signed [21:0] high_sum
);
  logic [47:0] cascade[0:8];
  logic [47:0] sum;
  assign cascade[0] = '0;
  for (genvar i = 0; i < 8; i++) begin : g_stage
    logic [23:0] late[0:i];
    always_comb late[0] = {low[i*8+:8], high[i*8+:8], activation[i*8+:8]};
    for (genvar d = 1; d <= i; d++) begin : g_late
      always_ff @(posedge clk) late[d] <= late[d-1];
    end
    logic [7:0] l, h, a;
    assign {l, h, a} = late[i];
    logic [47:0] p;
    DSP48E2 #(
        .AMULTSEL("AD"), .BMULTSEL("B"), .USE_MULT("MULTIPLY"), .USE_SIMD("ONE48"),
        .AREG(1), .ACASCREG(1), .BREG(2), .BCASCREG(2), .DREG(1), .ADREG(1), .MREG(1), .PREG(1), .CREG(0),
        .INMODEREG(0), .OPMODEREG(0), .ALUMODEREG(0), .CARRYINREG(0), .CARRYINSELREG(0)
    ) dsp (
        .CLK(clk), .A({{3{h[7]}}, {1{h[7]}}, h, 18'b0}), .B({{10{a[7]}}, a}), .C(48'b0), .D({{19{l[7]}}, l}),
        .PCIN(cascade[i]), .PCOUT(cascade[i+1]), .P(p), .INMODE(5'b00100),
        .OPMODE(i == 0 ? 9'b000000101 : 9'b000010101), .ALUMODE(4'b0), .CARRYIN(1'b0), .CARRYINSEL(3'b0),
        .ACIN(30'b0), .BCIN(18'b0), .CARRYCASCIN(1'b0), .MULTSIGNIN(1'b0),
        .CEA1(1'b0), .CEA2(1'b1), .CEB1(1'b1), .CEB2(1'b1), .CEC(1'b0), .CED(1'b1), .CEAD(1'b1), .CEM(1'b1),
        .CEP(1'b1), .CEALUMODE(1'b0), .CECTRL(1'b0), .CECARRYIN(1'b0), .CEINMODE(1'b0),
        .RSTA(1'b0), .RSTB(1'b0), .RSTC(1'b0), .RSTD(1'b0), .RSTM(1'b0), .RSTP(1'b0), .RSTCTRL(1'b0),
        .RSTALUMODE(1'b0), .RSTALLCARRYIN(1'b0), .RSTINMODE(1'b0)
    );
    if (i == 7) assign sum = p;
  end
  assign low_sum = $signed(sum[17:0]);
  assign high_sum = $signed(sum[39:18]) + $signed({21'b0, sum[17]});
endmodule
