// The DSP48E2 as far as rtl/mac_chain.sv uses it, after the block diagram of AMD UG579 (not AMD's own model):
// registers A2, D, AD, B1, B2, M and P; M = (A + D) * B; P = M, or M + PCIN.
module DSP48E2 #(
    parameter AMULTSEL = "A", BMULTSEL = "B", USE_MULT = "MULTIPLY", USE_SIMD = "ONE48",
    parameter int AREG = 1, ACASCREG = 1, BREG = 1, BCASCREG = 1, DREG = 1, ADREG = 1, MREG = 1, PREG = 1, CREG = 1,
    parameter int INMODEREG = 1, OPMODEREG = 1, ALUMODEREG = 1, CARRYINREG = 1, CARRYINSELREG = 1
) (
    input logic CLK, CEA1, CEA2, CEB1, CEB2, CEC, CED, CEAD, CEM, CEP, CEALUMODE, CECTRL, CECARRYIN, CEINMODE,
    input logic RSTA, RSTB, RSTC, RSTD, RSTM, RSTP, RSTCTRL, RSTALUMODE, RSTALLCARRYIN, RSTINMODE,
    input logic [29:0] A, ACIN,
    input logic [17:0] B, BCIN,
    input logic [47:0] C, PCIN,
    input logic [26:0] D,
    input logic [4:0] INMODE,
    input logic [8:0] OPMODE,
    input logic [3:0] ALUMODE,
    input logic CARRYIN, CARRYCASCIN, MULTSIGNIN,
    input logic [2:0] CARRYINSEL,
    output logic [47:0] P, PCOUT
);
  logic signed [26:0] a2, d, ad;
  logic signed [17:0] b1, b2;
  logic signed [47:0] m;
  assign PCOUT = P;
  always_ff @(posedge CLK) begin
    if (CEA2) a2 <= A[26:0];
    if (CED) d <= D;
    if (CEAD) ad <= a2 + d;
    if (CEB1) b1 <= B;
    if (CEB2) b2 <= b1;
    if (CEM) m <= 48'(ad * b2);
    if (CEP) P <= OPMODE[6:4] == 3'b001 ? m + PCIN : m;
  end
endmodule
