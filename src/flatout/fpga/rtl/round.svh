// Half of `twice`, rounded half up, limited to 27 or 32 bits. A shift by n is one by n - 1, then this.
function automatic logic [31:0] round_limit(input logic signed [63:0] twice, input logic narrow);
  logic [62:0] whole;
  logic [31:0] most;
  whole = twice[63:1];
  most = narrow ? 32'h03ffffff : 32'h7fffffff;
  if (narrow ? whole[62:26] != {37{whole[62]}} : whole[62:31] != {32{whole[62]}})
    round_limit = whole[62] ? ~most : most;
  else if (whole[31:0] == most) round_limit = most;
  else round_limit = whole[31:0] + {31'b0, twice[0]};
endfunction
