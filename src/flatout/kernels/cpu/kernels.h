// Kernels of one instruction set; ops.h says what each computes. No include guard: features.cpp includes it once for
// each FLATOUT_ISA namespace.

#include "ops.h"

namespace flatout {

namespace FLATOUT_ISA {
void linear_panel(const Linear&, const uint8_t* panel, const int8_t* scratch, const Activations&, int first, int count,
                  float* out);
void linear_panel_bf16(const Linear&, const uint8_t* panel, const int8_t* scratch, const Activations&, int first,
                       int count, float* out);
void linear_panel_amx(const Linear&, const uint8_t* panel, const int8_t* scratch, const Activations&, int first,
                      int count, float* out);
void prepare_panel(const Linear&, const uint8_t* panel, int8_t* scratch);
void rms_norm(const float* x, const float* weight, float eps, int d, float* out);
void quantize(const float* x, int k, int k_padded, int group, int groups, int act_group, int8_t* codes, float* scales,
              int32_t* sums, float* scaled_sums);
void round_bf16(const float* x, int k, int k_padded, uint16_t* out);
void gated(const float* gate, const float* up, int count, int lanes, bool gelu, float* out, int stride);
void rope(float* x, const float* table, int head_dim);
float log_sum_exp(const float* row, int n);
void write_kv(const float* k, const float* v, int head_dim, int head_dim_padded, int slot, bool int8_cache,
              uint8_t* page);
void attend(const Attention&, bool int8_cache);
void attend_amx(const Attention&, bool int8_cache);
}  // namespace FLATOUT_ISA
}  // namespace flatout
