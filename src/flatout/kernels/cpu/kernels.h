// Kernels of one instruction set; ops.h says what each computes. No include guard: features.cpp includes it once for
// each FLATOUT_ISA namespace.

#include "ops.h"

namespace flatout {

namespace FLATOUT_ISA {
void linear_panels(const Linear&, const uint8_t* const* panel, int panels, const int8_t* const* scratch,
                   const Activations&, int first, int count, float* const* out);
void linear_panels_bf16(const Linear&, const uint8_t* const* panel, int panels, const int8_t* const* scratch,
                        const Activations&, int first, int count, float* const* out);
void linear_panels_amx(const Linear&, const uint8_t* const* panel, int panels, const int8_t* const* scratch,
                       const Activations&, int first, int count, float* const* out);
void screen_panels(const Linear&, const uint8_t* panel, int panels, const Activations&, const float* sizes,
                   float* bounds, float* best, int* best_row);
int at_least(const float* values, int count, float threshold, int32_t* indices);
void collect_panel(const Linear&, const uint8_t* codes, const uint8_t* scales, const int32_t* rows, uint8_t* panel);
void begin_linear(const Linear&, int tokens);
void end_linear();
void prepare_panel(const Linear&, const uint8_t* panel, int8_t* scratch);
void unpack_panel(const Linear&, const uint8_t* panel, int8_t* scratch);
void rms_norm(const float* x, const float* weight, float eps, int d, float* out);
void quantize(const Linear&, const float* x, const Activations& row);
void round_bf16(const float* x, int k, int k_padded, uint16_t* out);
void epilogue(const float* tile, int count, int lanes, const float* bias, bool add, float* out, int stride);
void gated(const float* gate, const float* up, int count, int lanes, bool gelu, float* out, int stride);
void bias_gelu(const float* tile, int count, int lanes, const float* bias, float* out, int stride);
void layer_norm(const float* x, const float* weight, const float* bias, float eps, int d, float* out);
void scale_columns(const float* x, const float* factors, int d, float* out);
void rope(float* x, const float* table, int head_dim);
int argmax(const float* row, int n);
float log_sum_exp(const float* row, int n);
void round_block(const RoundBlock&, int first, int count);
int nearest_grid(const Grids&);
void write_kv(const float* k, const float* v, int head_dim, int head_dim_padded, int slot, CacheKind kind,
              uint8_t* page);
void attend(const Attention&);
void merge_chunks(const float* partial, int chunks, int stride, int head_dim, int head_dim_padded, float* out);
void attend_amx(const Attention&);
}  // namespace FLATOUT_ISA
}  // namespace flatout
