#include "model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "features.h"
#include "screen.h"
#include "weights.h"

namespace flatout {

namespace {

// Frequencies theta^(-2i/E), for Llama 3 slowed by `factor` where the wavelength exceeds the original context
// (smoothly between the two thresholds), as transformers' modeling_rope_utils computes them.
std::vector<float> rope_frequencies(const Config& c) {
  std::vector<float> frequency(c.head_dim / 2);
  for (int i = 0; i < c.head_dim / 2; ++i) {
    float f = 1.0f / std::pow(c.rope_theta, (float)(2 * i) / (float)c.head_dim);
    if (c.has_rope_scaling) {
      const RopeScaling& s = c.rope_scaling;
      const float wavelength = 2.0f * (float)M_PI / f;
      const float low = s.original_max_positions / s.low_freq_factor;
      const float high = s.original_max_positions / s.high_freq_factor;
      if (wavelength > low) {
        f /= s.factor;
      } else if (wavelength >= high) {
        const float smooth = (s.original_max_positions / wavelength - s.low_freq_factor) /
                             (s.high_freq_factor - s.low_freq_factor);
        f = (1.0f - smooth) * f / s.factor + smooth * f;
      }
    }
    frequency[i] = f;
  }
  return frequency;
}

}  // namespace

Model::Model(const Config& config, int threads, const std::string& isa, int num_pages)
    : config_(config),
      ops_(ops_for(isa)),
      pool_(threads),
      pace_(threads),
      team_(threads),
      num_pages_(num_pages),
      head_dim_padded_(round_up(config.head_dim, kLanes)),
      qkv_stride_(round_up((config.num_heads + 2 * config.num_kv_heads) * config.head_dim, kLanes)),
      hidden_stride_(round_up(config.hidden_size, kLanes)),
      gate_stride_(round_up(config.intermediate_size, kLanes)),
      attention_stride_(round_up(config.num_heads * config.head_dim, kLanes)),
      layers_(config.num_layers),
      arenas_(threads),
      scratch_(threads),
      next_item_(config.num_layers) {
  expect(num_pages >= 1, "num_pages must be at least 1");
  expect(head_dim_padded_ <= 256, "head_dim must be at most 256");
  head_bytes_ = kv_head_bytes(head_dim_padded_, config.cache_kind);
  page_bytes_ = head_bytes_ * config.num_layers * config.num_kv_heads;
  const int rows = kMaxStepTokens + kTileRows;
  cache_ = Buffer(page_bytes_ * num_pages);
  x_ = Buffer((size_t)rows * hidden_stride_ * sizeof(float));
  qkv_ = Buffer((size_t)rows * qkv_stride_ * sizeof(float));
  attended_ = Buffer((size_t)rows * attention_stride_ * sizeof(float));
  gated_ = Buffer((size_t)rows * gate_stride_ * sizeof(float));
  const std::vector<float> frequency = rope_frequencies(config);
  const int half = config.head_dim / 2;
  positions_ = (int)std::min<int64_t>((int64_t)num_pages * kPage, config.max_positions);
  rope_.resize((size_t)positions_ * config.head_dim);
  for (int p = 0; p < positions_; ++p)
    for (int i = 0; i < half; ++i) {
      const float angle = (float)p * frequency[i];
      rope_[(size_t)p * config.head_dim + i] = std::cos(angle);
      rope_[(size_t)p * config.head_dim + half + i] = std::sin(angle);
    }
}

void Model::set_vector(const std::string& name, const float* values, int count) {
  std::vector<float>* to = layer_field<Layer, std::vector<float>>(layers_, name,
                                                                  {{"input_norm", &Layer::input_norm},
                                                                   {"post_norm", &Layer::post_norm},
                                                                   {"qkv_bias", &Layer::qkv_bias},
                                                                   {"q_norm", &Layer::q_norm},
                                                                   {"k_norm", &Layer::k_norm}});
  if (name == "norm") to = &norm_;
  expect(to != nullptr, "unknown vector " + name);
  to->assign(values, values + count);
  if (name.ends_with("norm"))
    for (float& value : *to) value += config_.norm_offset;
}

void Model::set_weight(const std::string& name, const Source& s) {
  if (name == "embedding") {
    embedding_ = s;
    const size_t k = s.k, groups = s.group ? k / s.group : 1, width = s.half_scales ? 2 : 4;
    const bool integer = s.kind == WeightKind::kInteger;
    embedding_codes_ = Buffer(s.n * k * (integer ? 1 : s.bits / 8));
    if (integer) embedding_scales_ = Buffer(s.n * groups * width);
    if (s.zero == Zero::kMinimum) embedding_minima_ = Buffer(s.n * groups * width);
    if (s.zero == Zero::kAsymmetric) embedding_zeros_ = Buffer(s.n * groups);
    pool_.run([&](int thread) {
      std::vector<uint8_t> scratch;
      const auto share = [&](int t) { return (int)((int64_t)s.n * t / pool_.size()); };
      for (int row = share(thread); row < share(thread + 1); ++row) {
        const size_t first = row * k, at = row * groups;
        if (s.kind == WeightKind::kFloat32) {
          std::memcpy(embedding_codes_.data + first * 4, s.values + first, k * 4);
        } else if (s.kind == WeightKind::kBFloat16) {
          for (size_t i = first; i < first + k; ++i) ((uint16_t*)embedding_codes_.data)[i] = round_to_bf16(s.values[i]);
        } else {
          const SourceRow in = source_row(s, row, scratch);
          std::memcpy(embedding_codes_.data + first, in.codes, k);
          std::memcpy(embedding_scales_.data + at * width, in.scales, groups * width);
          if (s.zero == Zero::kMinimum) std::memcpy(embedding_minima_.data + at * width, in.minima, groups * width);
          if (s.zero == Zero::kAsymmetric) std::memcpy(embedding_zeros_.data + at, s.zeros + at, groups);
        }
      }
    }, pool_.size());
    return;
  }
  const bool interleaved = name.ends_with(".gate_up");
  Linear* to = layer_field<Layer, Linear>(
      layers_, name,
      {{"qkv", &Layer::qkv}, {"o", &Layer::o}, {"gate_up", &Layer::gate_up}, {"down", &Layer::down}});
  if (name == "head") to = &head_;
  expect(to != nullptr, "unknown weight " + name);
  *to = pack_linear(s, interleaved, arenas_, pool_);
}

void Model::finalize() {
  const Config& c = config_;
  const int q = c.num_heads * c.head_dim, qkv = q + 2 * c.num_kv_heads * c.head_dim;
  LinearChecks linears;
  for (int i = 0; i < c.num_layers; ++i) {
    const Layer& l = layers_[i];
    const std::string at = "layers." + std::to_string(i) + ".";
    linears.check(l.qkv, qkv, c.hidden_size, at + "qkv");
    linears.check(l.o, c.hidden_size, q, at + "o");
    linears.check(l.gate_up, 2 * c.intermediate_size, c.hidden_size, at + "gate_up");
    linears.check(l.down, c.hidden_size, c.intermediate_size, at + "down");
    check_vector(l.input_norm, c.hidden_size, at + "input_norm");
    check_vector(l.post_norm, c.hidden_size, at + "post_norm");
    check_vector(l.qkv_bias, c.qkv_bias ? qkv : 0, at + "qkv_bias");
    check_vector(l.q_norm, c.qk_norm ? c.head_dim : 0, at + "q_norm");
    check_vector(l.k_norm, c.qk_norm ? c.head_dim : 0, at + "k_norm");
  }
  check_vector(norm_, c.hidden_size, "norm");
  linears.check(head_, c.vocab_size, c.hidden_size, "head");
  expect(embedding_.n == c.vocab_size && embedding_.k == c.hidden_size, "embedding is missing or has the wrong shape");
  const int rows = kMaxStepTokens + kTileRows;
  shared_ = Buffer(activation_bytes(rows, linears.widest, linears.most_groups));
  activation_rows_ = round_up(kMaxStepTokens / pool_.size(), kTileRows) + 3 * kTileRows;  // see token_shares
  for (ThreadScratch& s : scratch_) {
    s.activations = Buffer(activation_bytes(activation_rows_, linears.widest, linears.most_groups));
    s.panel = Buffer((size_t)2 * kLanes * linears.widest);
    s.normed = Buffer((size_t)std::max(linears.widest, hidden_stride_) * sizeof(float));
  }
  finalized_ = true;
}

size_t Model::weight_bytes() const {
  return taken(arenas_) + embedding_codes_.bytes + embedding_scales_.bytes + embedding_minima_.bytes;
}

}  // namespace flatout
