// One decoder-only model on the CPU: its packed weights, its paged KV cache and the forward step.
#pragma once

#include <atomic>
#include <string>
#include <unordered_map>
#include <vector>

#include "matmul.h"
#include "pace.h"
#include "threads.h"

namespace flatout {

struct RopeScaling {  // Llama 3
  float factor, low_freq_factor, high_freq_factor, original_max_positions;
};

struct Config {
  int vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim, max_positions;
  float rope_theta, rms_norm_eps, norm_offset, embedding_scale;
  bool has_rope_scaling;
  RopeScaling rope_scaling;
  bool qkv_bias, qk_norm, gelu;
  CacheKind cache_kind;
  int sliding_window;  // 0: none
};

// New tokens of several sequences, concatenated. pages is [sequences][page_columns].
struct Batch {
  const int32_t *tokens, *starts, *lengths, *pages;
  int total, sequences, page_columns;
};

struct Sampling {
  const float *temperature, *top_p;
  const int32_t* top_k;
  const uint64_t* seeds;
};

enum Phase { kEmbedding, kQkv, kAttention, kO, kGateUp, kDown, kHead, kOther, kPhases };
extern const char* const kPhaseNames[kPhases];

constexpr int kMaxStepTokens = 512;

class Model {
 public:
  Model(const Config&, int threads, const std::string& isa, int num_pages);

  // Names as in core/model.py. `source` is copied. The embedding stays row-major, linears are packed.
  void set_vector(const std::string& name, const float* values, int count);
  void set_weight(const std::string& name, const Source& source);
  void tie_head();  // instead of setting it: it is the embedding
  void finalize();  // throws std::invalid_argument naming what is missing or misshapen

  // Logits of the last token of each sequence, or of every token: rows of vocab_size.
  void forward(const Batch&, bool all, float* logits);
  // log p(target[i] | tokens up to i) of every token.
  void score(const Batch&, const int32_t* targets, float* out);
  // The token after the last token of each sequence, or after every token; parameters are those of its sequence.
  void sample(const Batch&, const Sampling&, bool all, int32_t* out);

  void set_profiling(bool on) { profiling_ = on; }
  std::vector<double> take_timings();  // seconds by Phase since the last call
  int num_pages() const { return num_pages_; }
  size_t weight_bytes() const;
  const char* isa() const { return ops_->name; }
  // Rows that the last greedy step of one token multiplied exactly; -1 when the head was not screened.
  int screened() const { return screened_; }
  const Config& config() const { return config_; }

 private:
  struct Layer {
    std::vector<float> input_norm, post_norm, qkv_bias, q_norm, k_norm;
    Linear qkv, o, gate_up, down;
  };
  struct ThreadScratch {
    Buffer activations, panel, normed;
  };

  int chunk_floats() const { return config_.num_heads * partial_floats(head_dim_padded_); }  // partial sums of a chunk
  bool by_token(int count) const;  // whether threads take tokens rather than rows of the weights
  void pack_head();
  void check(const Batch&) const;
  void begin(const Batch&);
  void layers(const Batch&, int thread);
  void lookup(int32_t token, float* out) const;
  void head(const float* hidden, const int32_t* rows, int count, float* logits, int thread);
  void head_greedy(int32_t row, float* bounds, int thread);
  int32_t take_best();
  void run(const std::function<void(int)>& task);  // on the step's threads
  void rotate(const Batch&, int layer, int token, int head);
  void write_cache(const Batch&, int layer, int thread);
  void plan_attention(int tokens);
  void attention(const Batch&, int layer, int thread);
  // Input rows (normed when norm is given) in the form `w` needs, ready on all threads when it returns.
  Activations prepare(const Linear& w, const float* x, int stride, const int32_t* rows, int count,
                      const std::vector<float>* norm, int thread);
  void linear(const Linear& w, const Activations&, int count, Epilogue, const float* bias, float* out, int stride,
              int thread);
  void mark(Phase phase, int thread);
  uint8_t* page_head(int layer, int kv_head) const;

  Config config_;
  const Ops* ops_;
  ThreadPool pool_;
  Pace pace_;
  int team_;            // threads that take part in the step
  bool paced_ = false;  // whether its time tells pace_ something
  int activation_rows_ = 0;  // tokens that a thread's own activation buffer holds
  int positions_;            // that a sequence may reach
  int num_pages_, head_dim_padded_, qkv_stride_, hidden_stride_, gate_stride_, attention_stride_;
  size_t head_bytes_, page_bytes_;  // a page holds all layers' heads, so that a short context touches little memory
  std::vector<Layer> layers_;
  std::vector<float> norm_, rope_;
  std::vector<Arena> arenas_;  // of each thread
  Linear head_, screen_;
  Source head_source_;  // of a tied head: the embedding's rows
  int screened_ = -1, screen_pause_ = 0;
  float candidates_lately_ = 0;
  struct alignas(64) Best {  // of one thread
    float value = -kInfinity;
    int32_t row = -1;
    int candidates = 0;
    bool finite = true;
  };
  std::vector<Best> best_;
  std::vector<int32_t> candidates_;
  Source embedding_;
  Buffer embedding_codes_, embedding_scales_, embedding_minima_, embedding_zeros_;
  Buffer cache_, x_, qkv_, attended_, gated_, shared_, logits_;
  std::vector<ThreadScratch> scratch_;
  std::vector<int32_t> token_sequence_, token_position_, last_rows_;
  struct Block {
    int sequence, first_token, rows;
  };
  std::vector<Block> blocks_;
  struct Item {  // attention work: some heads of one block, all of its pages or (split >= 0) a chunk of them
    int block, first_head, heads, split, chunk;
  };
  struct Split {  // a block whose pages are split: its partial sums lie at `offset`, chunk by chunk
    int block, first_chunk, chunks;
    size_t offset;
  };
  std::vector<Item> items_;
  std::vector<Split> splits_;
  bool write_with_attention_ = false;  // each item writes the keys and values it needs first
  std::vector<float> partials_;
  std::vector<std::atomic<int>> next_item_;  // attention work taken, one counter a layer
  bool profiling_ = false, finalized_ = false;
  double timings_[kPhases] = {};
  double last_mark_ = 0.0;
};

// The next token by the rules of engine/sampler.py, or kNotFinite when a logit is not a number.
constexpr int32_t kNotFinite = -1;
int32_t sample_token(const Ops&, const float* logits, int n, float temperature, int top_k, float top_p,
                     uint64_t seed, int64_t position);

}  // namespace flatout
