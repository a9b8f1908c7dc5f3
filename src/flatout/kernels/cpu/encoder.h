// One encoder of the BERT family on the CPU: its packed weights and the forward pass over packed sequences.
#pragma once

#include <string>
#include <vector>

#include "matmul.h"
#include "threads.h"

namespace flatout {

struct EncoderConfig {
  int vocab_size, hidden_size, intermediate_size, num_layers, num_heads, head_dim, max_positions;
  float layer_norm_eps;
  CacheKind cache_kind;
};

// Sequences concatenated: sequence s is tokens starts[s] .. starts[s + 1], the last one ends at `total`.
struct Sequences {
  const int32_t *tokens, *starts;
  int total, count;
  int end(int s) const { return s + 1 < count ? starts[s + 1] : total; }
};

enum class Pooling { kNone, kMean, kFirst };

class Encoder {
 public:
  Encoder(const EncoderConfig&, int threads, const std::string& isa);

  // Names as in core/encoder.py. `values` and `source` are copied.
  void set_vector(const std::string& name, const float* values, int count);
  void set_weight(const std::string& name, const Source& source);
  void finalize();  // throws std::invalid_argument naming what is missing or misshapen

  // Hidden states (total, D) of every token, or pooled (count, D), each row divided by its length if `normalize`.
  void forward(const Sequences&, Pooling, bool normalize, float* out);

  size_t weight_bytes() const {
    return taken(arenas_) + words_.size() * 2 + (word_floats_.size() + positions_.size()) * 4;
  }
  const char* isa() const { return ops_->name; }
  const EncoderConfig& config() const { return config_; }

 private:
  struct Layer {
    std::vector<float> qkv_bias, o_bias, attention_norm, attention_norm_bias, up_bias, down_bias, output_norm,
        output_norm_bias;
    std::vector<float> qkv_factors, o_factors, up_factors, down_factors;  // none, or one for each column
    Linear qkv, o, up, down;
  };
  struct Norm {
    const std::vector<float>&weight, &bias;
  };
  struct Chunk {  // whole sequences that go through the layers together
    int first_token, tokens, first_sequence, sequences;
  };
  struct Block {  // up to 16 queries of one sequence
    int sequence, first_token, rows;
  };

  void plan(const Sequences&);
  bool by_token(int count) const;  // whether threads take tokens rather than rows of the weights
  Rows own_rows(int count, int thread) const;
  void embed(const Sequences&, const Chunk&, int thread);
  void layers(const Sequences&, const Chunk&, int thread);
  // This thread's rows of x, times `factors` if there are any, in the form `w` needs, normalised in place before if
  // `norm`; all rows when it returns.
  Activations prepare(const Linear& w, const std::vector<float>& factors, float* x, int stride, int count, const Norm* norm,
                      int thread);
  void linear(const Linear& w, const Activations&, int count, Epilogue, const std::vector<float>& bias, float* out,
              int stride, int thread);
  void write_keys(const Chunk&, int thread);
  void attention(const Sequences&, const Layer&, const Chunk&, int thread);
  void write_out(const Sequences&, const Chunk&, Pooling, bool normalize, float* out, int thread);
  uint8_t* page(int head, int index) const;

  EncoderConfig config_;
  const Ops* ops_;
  ThreadPool pool_;
  int head_dim_padded_, hidden_stride_, qkv_stride_, up_stride_;
  int chunk_tokens_, chunk_pages_, own_tokens_;  // most tokens and pages of a chunk, most tokens of a thread
  size_t page_bytes_;
  std::vector<Layer> layers_;
  std::vector<float> embedding_norm_, embedding_norm_bias_, positions_, word_floats_;
  std::vector<uint16_t> words_;  // bf16
  bool finalized_ = false;
  int word_rows_ = 0, word_columns_ = 0;
  std::vector<Arena> arenas_;  // of each thread
  Buffer cache_, x_, qkv_, attended_, up_, shared_;
  struct ThreadScratch {
    Buffer activations, panel;
    std::vector<float> row;
  };
  std::vector<ThreadScratch> scratch_;
  std::vector<Chunk> chunks_;
  std::vector<Block> blocks_;
  std::vector<int> first_block_;  // of each chunk, and the end
  std::vector<int32_t> first_page_, slots_, identity_;  // of each sequence; of each token, in its chunk's pages
};

}  // namespace flatout
