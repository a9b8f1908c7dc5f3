#include "model.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "features.h"

namespace flatout {

const char* const kPhaseNames[kPhases] = {"embedding", "qkv", "attention", "o", "gate_up", "down", "head", "other"};

namespace {

constexpr int kTokenBlock = 64;   // tokens a panel is multiplied by before its results are stored
constexpr int kQueryBlock = 16;   // queries of one head that attention takes together
constexpr int kLocalRows = 2;     // up to this many rows every thread prepares its own copy instead of meeting

int round_up(int v, int to) { return (v + to - 1) / to * to; }

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

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

void expect(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

}  // namespace

Model::Model(const Config& config, int threads, const std::string& isa, int num_pages)
    : config_(config),
      ops_(ops_for(isa)),
      pool_(threads),
      num_pages_(num_pages),
      head_dim_padded_(round_up(config.head_dim, kLanes)),
      qkv_stride_(round_up((config.num_heads + 2 * config.num_kv_heads) * config.head_dim, kLanes)),
      hidden_stride_(round_up(config.hidden_size, kLanes)),
      gate_stride_(round_up(config.intermediate_size, kLanes)),
      attention_stride_(round_up(config.num_heads * config.head_dim, kLanes)),
      layers_(config.num_layers),
      scratch_(threads),
      next_block_(config.num_layers) {
  expect(num_pages >= 1, "num_pages must be at least 1");
  expect(head_dim_padded_ <= 256, "head_dim must be at most 256");
  page_bytes_ = kv_head_bytes(head_dim_padded_, config.int8_cache);
  const int rows = kMaxStepTokens + kTileRows;
  cache_ = Buffer(page_bytes_ * config.num_layers * config.num_kv_heads * num_pages);
  x_ = Buffer((size_t)rows * hidden_stride_ * sizeof(float));
  qkv_ = Buffer((size_t)rows * qkv_stride_ * sizeof(float));
  attended_ = Buffer((size_t)rows * attention_stride_ * sizeof(float));
  gated_ = Buffer((size_t)rows * gate_stride_ * sizeof(float));
  const std::vector<float> frequency = rope_frequencies(config);
  const int half = config.head_dim / 2;
  const int positions = num_pages * kPage;
  rope_.resize((size_t)positions * config.head_dim);
  for (int p = 0; p < positions; ++p)
    for (int i = 0; i < half; ++i) {
      const float angle = (float)p * frequency[i];
      rope_[(size_t)p * config.head_dim + i] = std::cos(angle);
      rope_[(size_t)p * config.head_dim + half + i] = std::sin(angle);
    }
}

void Model::set_vector(const std::string& name, const float* values, int count) {
  std::vector<float> v(values, values + count);
  const bool is_norm = name.size() >= 4 && name.compare(name.size() - 4, 4, "norm") == 0;
  if (is_norm)
    for (float& value : v) value += config_.norm_offset;
  int layer = -1;
  char field[32] = {};
  if (name == "norm") {
    norm_ = std::move(v);
  } else if (std::sscanf(name.c_str(), "layers.%d.%31s", &layer, field) == 2 && layer >= 0 &&
             layer < config_.num_layers) {
    Layer& l = layers_[layer];
    const std::string f = field;
    if (f == "input_norm") l.input_norm = std::move(v);
    else if (f == "post_norm") l.post_norm = std::move(v);
    else if (f == "qkv_bias") l.qkv_bias = std::move(v);
    else if (f == "q_norm") l.q_norm = std::move(v);
    else if (f == "k_norm") l.k_norm = std::move(v);
    else throw std::invalid_argument("unknown vector " + name);
  } else {
    throw std::invalid_argument("unknown vector " + name);
  }
}

void Model::set_weight(const std::string& name, const Source& s) {
  int layer = -1;
  char field[32] = {};
  if (name == "head") {
    head_ = pack_linear(s, false);
  } else if (name == "embedding") {
    embedding_ = s;
    const size_t values = (size_t)s.n * s.k, groups = s.group ? (size_t)s.n * (s.k / s.group) : (size_t)s.n;
    const auto copy = [](Buffer& to, const void* from, size_t bytes) {
      to = Buffer(bytes);
      std::memcpy(to.data, from, bytes);
    };
    if (s.kind == WeightKind::kFloat32) {
      copy(embedding_codes_, s.values, values * 4);
    } else if (s.kind == WeightKind::kBFloat16) {
      embedding_codes_ = Buffer(values * 2);
      for (size_t i = 0; i < values; ++i) ((uint16_t*)embedding_codes_.data)[i] = round_to_bf16(s.values[i]);
    } else {
      const size_t width = s.half_scales ? 2 : 4;
      copy(embedding_codes_, s.codes, values);
      copy(embedding_scales_, s.scales, groups * width);
      if (s.zero == Zero::kMinimum) copy(embedding_minima_, s.minima, groups * width);
      if (s.zero == Zero::kAsymmetric) copy(embedding_zeros_, s.zeros, groups);
    }
  } else if (std::sscanf(name.c_str(), "layers.%d.%31s", &layer, field) == 2 && layer >= 0 &&
             layer < config_.num_layers) {
    Layer& l = layers_[layer];
    const std::string f = field;
    if (f == "qkv") l.qkv = pack_linear(s, false);
    else if (f == "o") l.o = pack_linear(s, false);
    else if (f == "gate_up") l.gate_up = pack_linear(s, true);
    else if (f == "down") l.down = pack_linear(s, false);
    else throw std::invalid_argument("unknown weight " + name);
  } else {
    throw std::invalid_argument("unknown weight " + name);
  }
}

void Model::finalize() {
  const Config& c = config_;
  const int q = c.num_heads * c.head_dim, qkv = q + 2 * c.num_kv_heads * c.head_dim;
  int widest = 0, most_groups = 0;
  const auto check_linear = [&](const PackedLinear& w, int n, int k, const std::string& name) {
    expect(w.view.n == n && w.view.k == k, name + " is missing or has the wrong shape");
    widest = std::max(widest, w.view.row_stride);
    most_groups = std::max(most_groups, w.view.groups);
  };
  const auto check_vector = [&](const std::vector<float>& v, int n, const std::string& name) {
    expect((int)v.size() == n, name + " is missing or has the wrong length");
  };
  for (int i = 0; i < c.num_layers; ++i) {
    const Layer& l = layers_[i];
    const std::string at = "layers." + std::to_string(i) + ".";
    check_linear(l.qkv, qkv, c.hidden_size, at + "qkv");
    check_linear(l.o, c.hidden_size, q, at + "o");
    check_linear(l.gate_up, 2 * c.intermediate_size, c.hidden_size, at + "gate_up");
    check_linear(l.down, c.hidden_size, c.intermediate_size, at + "down");
    check_vector(l.input_norm, c.hidden_size, at + "input_norm");
    check_vector(l.post_norm, c.hidden_size, at + "post_norm");
    check_vector(l.qkv_bias, c.qkv_bias ? qkv : 0, at + "qkv_bias");
    check_vector(l.q_norm, c.qk_norm ? c.head_dim : 0, at + "q_norm");
    check_vector(l.k_norm, c.qk_norm ? c.head_dim : 0, at + "k_norm");
  }
  check_vector(norm_, c.hidden_size, "norm");
  check_linear(head_, c.vocab_size, c.hidden_size, "head");
  expect(embedding_.n == c.vocab_size && embedding_.k == c.hidden_size, "embedding is missing or has the wrong shape");
  // One activation buffer: codes, bf16 or floats of the widest input, and four arrays of group values.
  const int rows = kMaxStepTokens + kTileRows;
  activation_bytes_ = (size_t)rows * (widest + 4 * most_groups) * sizeof(float);
  shared_ = Buffer(activation_bytes_);
  for (ThreadScratch& s : scratch_) {
    s.activations = Buffer((size_t)kTileRows * (widest + 4 * most_groups) * sizeof(float));
    s.panel = Buffer((size_t)2 * kLanes * widest);
    s.normed = Buffer((size_t)std::max(widest, hidden_stride_) * sizeof(float));
  }
  finalized_ = true;
}

size_t Model::weight_bytes() const {
  size_t total = head_.memory.bytes + embedding_codes_.bytes + embedding_scales_.bytes + embedding_minima_.bytes;
  for (const Layer& l : layers_)
    total += l.qkv.memory.bytes + l.o.memory.bytes + l.gate_up.memory.bytes + l.down.memory.bytes;
  return total;
}

void Model::check(const Batch& b) const {
  expect(finalized_, "the model has weights missing: call finalize first");
  expect(b.sequences >= 1, "a step needs at least one sequence");
  expect(b.total <= kMaxStepTokens,
         "a step takes at most " + std::to_string(kMaxStepTokens) + " tokens, got " + std::to_string(b.total));
  int64_t total = 0;
  for (int s = 0; s < b.sequences; ++s) {
    expect(b.lengths[s] >= 1 && b.starts[s] >= 0, "lengths must be at least 1 and starts at least 0");
    const int64_t end = (int64_t)b.starts[s] + b.lengths[s];
    const int64_t needed = (end + kPage - 1) / kPage;
    expect(end <= (int64_t)num_pages_ * kPage && needed <= b.page_columns,
           "position " + std::to_string(end - 1) + " is beyond the page table or the cache");
    for (int p = 0; p < needed; ++p) {
      const int32_t page = b.pages[(size_t)s * b.page_columns + p];
      expect(page >= 0 && page < num_pages_, "page " + std::to_string(page) + " does not exist");
    }
    total += b.lengths[s];
  }
  expect(total == b.total, "lengths must add up to the number of tokens");
  for (int t = 0; t < b.total; ++t)
    expect(b.tokens[t] >= 0 && b.tokens[t] < config_.vocab_size,
           "token " + std::to_string(b.tokens[t]) + " is outside the vocabulary");
}

void Model::begin(const Batch& b) {
  check(b);
  token_sequence_.clear();
  token_position_.clear();
  last_rows_.clear();
  blocks_.clear();
  for (int s = 0; s < b.sequences; ++s) {
    for (int first = 0; first < b.lengths[s]; first += kQueryBlock)
      blocks_.push_back({s, (int)token_sequence_.size() + first, std::min(kQueryBlock, b.lengths[s] - first)});
    for (int i = 0; i < b.lengths[s]; ++i) {
      token_sequence_.push_back(s);
      token_position_.push_back(b.starts[s] + i);
    }
    last_rows_.push_back((int32_t)token_sequence_.size() - 1);
  }
  for (auto& next : next_block_) next.store(0, std::memory_order_relaxed);
  if (profiling_) last_mark_ = now();
}

void Model::mark(Phase phase, int thread) {
  if (!profiling_ || thread != 0) return;
  const double t = now();
  timings_[phase] += t - last_mark_;
  last_mark_ = t;
}

std::vector<double> Model::take_timings() {
  std::vector<double> t(timings_, timings_ + kPhases);
  std::fill(timings_, timings_ + kPhases, 0.0);
  return t;
}

uint8_t* Model::page_head(int layer, int kv_head) const {
  return cache_.data + ((size_t)layer * config_.num_kv_heads + kv_head) * num_pages_ * page_bytes_;
}

void Model::lookup(int32_t token, float* out) const {
  const Source& e = embedding_;
  const size_t row = (size_t)token * e.k;
  if (e.kind == WeightKind::kFloat32) {
    std::memcpy(out, embedding_codes_.data + row * 4, (size_t)e.k * 4);
  } else if (e.kind == WeightKind::kBFloat16) {
    for (int k = 0; k < e.k; ++k) {
      const uint32_t bits = (uint32_t)((const uint16_t*)embedding_codes_.data)[row + k] << 16;
      std::memcpy(out + k, &bits, 4);
    }
  } else {
    const int group = e.group ? e.group : e.k, groups = e.k / group;
    const auto value = [&](const Buffer& b, size_t i) {
      if (!e.half_scales) return ((const float*)b.data)[i];
      _Float16 h;
      std::memcpy(&h, b.data + 2 * i, 2);
      return (float)h;
    };
    for (int g = 0; g < groups; ++g) {
      const size_t at = (size_t)token * groups + g;
      const float scale = value(embedding_scales_, at);
      const float minimum = e.zero == Zero::kMinimum ? value(embedding_minima_, at) : 0.0f;
      const int zero = e.zero == Zero::kAsymmetric ? embedding_zeros_.data[at] : (e.bits == 4 && e.zero == Zero::kSymmetric ? 8 : 0);
      const bool is_signed = e.bits == 8 && e.zero == Zero::kSymmetric;
      for (int k = g * group; k < (g + 1) * group; ++k) {
        const int code = is_signed ? (int8_t)embedding_codes_.data[row + k] : embedding_codes_.data[row + k];
        out[k] = scale * (float)(code - zero) + minimum;
      }
    }
  }
  if (config_.embedding_scale != 1.0f)
    for (int k = 0; k < e.k; ++k) out[k] *= config_.embedding_scale;
}

Activations Model::prepare(const Linear& w, const float* x, int stride, const int32_t* rows, int count,
                           const std::vector<float>* norm, int thread) {
  const bool local = count <= kLocalRows;
  uint8_t* memory = local ? scratch_[thread].activations.data : shared_.data;
  const int capacity = local ? kTileRows : round_up(count, kTileRows);
  Activations a;
  if (w.kind == WeightKind::kInteger) {
    const size_t values = (size_t)capacity * w.groups, codes = (size_t)capacity * w.row_stride;
    a.scales = (float*)memory;
    a.scaled_sums = a.scales + values;
    a.sums[0] = (int32_t*)(a.scaled_sums + values);
    a.sums[1] = a.sums[0] + values;
    a.codes[0] = (int8_t*)(a.sums[1] + values);  // capacity is a multiple of 16: the codes start on a cache line
    a.codes[1] = a.codes[0] + codes;
  } else if (w.kind == WeightKind::kBFloat16) {
    a.bf16 = (uint16_t*)memory;
  } else {
    a.floats = (float*)memory;
  }
  float* normed = (float*)scratch_[thread].normed.data;
  const int step = local ? 1 : pool_.size();
  for (int r = local ? 0 : thread; r < count; r += step) {
    const float* in = x + (size_t)(rows ? rows[r] : r) * stride;
    if (norm) {
      ops_->rms_norm(in, norm->data(), config_.rms_norm_eps, w.k, normed);
      in = normed;
    }
    const size_t at = (size_t)r * w.row_stride;
    if (w.kind == WeightKind::kInteger) {
      const size_t values = group_index(r, 0, w.groups);
      Activations row = a;
      row.scales += values;
      row.scaled_sums += values;
      for (int p = 0; p < 2; ++p) row.sums[p] += values, row.codes[p] += at;
      ops_->quantize(w, in, row);
    } else if (a.bf16) {
      ops_->round_bf16(in, w.k, w.k_padded, a.bf16 + at);
    } else {
      std::memcpy(a.floats + at, in, (size_t)w.k * sizeof(float));
      std::memset(a.floats + at + w.k, 0, (size_t)(w.k_padded - w.k) * sizeof(float));
    }
  }
  if (!local) pool_.barrier();
  return a;
}

void Model::linear(const Linear& w, const Activations& a, int count, Epilogue epilogue, const float* bias, float* out,
                   int stride, int thread) {
  const bool gate = epilogue == Epilogue::kGated;  // panels of gate and up alternate
  const int units = (w.panels + 1) / 2, threads = pool_.size();
  const int begin = (int)((int64_t)units * thread / threads), end = (int)((int64_t)units * (thread + 1) / threads);
  const int width = gate ? w.n / 2 : w.n;
  const bool prepared = ops_->prepare_panel != nullptr && count >= kTileMinimum;
  int8_t* memory = (int8_t*)scratch_[thread].panel.data;
  const int8_t* scratch[2] = {memory, memory + (size_t)kLanes * w.k_padded};
  alignas(64) float tile[2][kTokenBlock * kLanes];
  float* const tiles[2] = {tile[0], tile[1]};
  if (ops_->begin_linear && count >= kTileMinimum) ops_->begin_linear(w);
  for (int u = begin; u < end; ++u) {
    const int panels = std::min(2, w.panels - 2 * u);
    const uint8_t* first_panel = w.data + (size_t)2 * u * w.panel_bytes;
    const uint8_t* panel[2] = {first_panel, first_panel + w.panel_bytes};
    for (int p = 0; prepared && p < panels; ++p)
      ops_->prepare_panel(w, panel[p], memory + (size_t)p * kLanes * w.k_padded);
    for (int m = 0; m < count; m += kTokenBlock) {
      const int rows = std::min(kTokenBlock, count - m);
      ops_->linear_panels(w, panel, panels, scratch, a, m, rows, tiles);
      if (gate) {
        const int column = u * kLanes;
        ops_->gated(tile[0], tile[1], rows, std::min(kLanes, width - column), config_.gelu,
                    out + (size_t)m * stride + column, stride);
        continue;
      }
      for (int p = 0; p < panels; ++p) {
        const int column = (2 * u + p) * kLanes;
        ops_->epilogue(tile[p], rows, std::min(kLanes, width - column), bias ? bias + column : nullptr,
                       epilogue == Epilogue::kAdd, out + (size_t)m * stride + column, stride);
      }
    }
  }
  if (ops_->end_linear && count >= kTileMinimum) ops_->end_linear();
}

// Rotate q and k, normalise them where the model does, and store k and v: one item a token and head.
void Model::write_cache(const Batch& b, int layer, int thread) {
  const Config& c = config_;
  const Layer& l = layers_[layer];
  const int heads = c.num_heads + c.num_kv_heads, items = b.total * heads;
  const int first = (int)((int64_t)items * thread / pool_.size());
  const int last = (int)((int64_t)items * (thread + 1) / pool_.size());
  for (int item = first; item < last; ++item) {
    const int t = item / heads, h = item % heads, position = token_position_[t];
    float* row = (float*)qkv_.data + (size_t)t * qkv_stride_;
    float* x = row + (size_t)h * c.head_dim;  // k heads follow the q heads
    if (c.qk_norm) {
      const std::vector<float>& weight = h < c.num_heads ? l.q_norm : l.k_norm;
      ops_->rms_norm(x, weight.data(), c.rms_norm_eps, c.head_dim, x);
    }
    ops_->rope(x, rope_.data() + (size_t)position * c.head_dim, c.head_dim);
    if (h < c.num_heads) continue;
    const int kv = h - c.num_heads;
    const int32_t page = b.pages[(size_t)token_sequence_[t] * b.page_columns + position / kPage];
    ops_->write_kv(x, x + (size_t)c.num_kv_heads * c.head_dim, c.head_dim, head_dim_padded_, position % kPage,
                   c.int8_cache, page_head(layer, kv) + (size_t)page * page_bytes_);
  }
  pool_.barrier();
}

void Model::attention(const Batch& b, int layer, int thread) {
  const Config& c = config_;
  const int items = (int)blocks_.size() * c.num_heads;
  (void)thread;
  for (;;) {
    const int item = next_block_[layer].fetch_add(1, std::memory_order_relaxed);
    if (item >= items) break;
    // Later blocks of a sequence see more keys: hand the longest out first.
    const Block& block = blocks_[blocks_.size() - 1 - item / c.num_heads];
    const int h = item % c.num_heads;
    Attention a;
    a.q = (const float*)qkv_.data + (size_t)block.first_token * qkv_stride_ + (size_t)h * c.head_dim;
    a.q_stride = qkv_stride_;
    a.out = (float*)attended_.data + (size_t)block.first_token * attention_stride_ + (size_t)h * c.head_dim;
    a.out_stride = attention_stride_;
    a.rows = block.rows;
    a.first_position = token_position_[block.first_token];
    a.window = c.sliding_window;
    a.head_dim = c.head_dim;
    a.head_dim_padded = head_dim_padded_;
    a.pages = b.pages + (size_t)block.sequence * b.page_columns;
    a.cache = page_head(layer, h / (c.num_heads / c.num_kv_heads));
    a.page_stride = page_bytes_;
    a.scale = 1.0f / std::sqrt((float)c.head_dim);
    ops_->attend(a, c.int8_cache);
  }
  pool_.barrier();
}

void Model::layers(const Batch& b, int thread) {
  float* x = (float*)x_.data;
  float* qkv = (float*)qkv_.data;
  float* attended = (float*)attended_.data;
  float* gated = (float*)gated_.data;
  const int T = b.total;
  for (int t = thread; t < T; t += pool_.size()) lookup(b.tokens[t], x + (size_t)t * hidden_stride_);
  pool_.barrier();
  mark(kEmbedding, thread);
  for (int i = 0; i < config_.num_layers; ++i) {
    const Layer& l = layers_[i];
    Activations a = prepare(l.qkv.view, x, hidden_stride_, nullptr, T, &l.input_norm, thread);
    const float* bias = l.qkv_bias.empty() ? nullptr : l.qkv_bias.data();
    linear(l.qkv.view, a, T, Epilogue::kStore, bias, qkv, qkv_stride_, thread);
    pool_.barrier();
    mark(kQkv, thread);
    write_cache(b, i, thread);
    attention(b, i, thread);
    mark(kAttention, thread);
    a = prepare(l.o.view, attended, attention_stride_, nullptr, T, nullptr, thread);
    linear(l.o.view, a, T, Epilogue::kAdd, nullptr, x, hidden_stride_, thread);
    pool_.barrier();
    mark(kO, thread);
    a = prepare(l.gate_up.view, x, hidden_stride_, nullptr, T, &l.post_norm, thread);
    linear(l.gate_up.view, a, T, Epilogue::kGated, nullptr, gated, gate_stride_, thread);
    pool_.barrier();
    mark(kGateUp, thread);
    a = prepare(l.down.view, gated, gate_stride_, nullptr, T, nullptr, thread);
    linear(l.down.view, a, T, Epilogue::kAdd, nullptr, x, hidden_stride_, thread);
    pool_.barrier();
    mark(kDown, thread);
  }
}

// Logits of `rows` of the hidden state; every thread returns once all are written.
void Model::head(const float* hidden, const int32_t* rows, int count, float* logits, int thread) {
  const Activations a = prepare(head_.view, hidden, hidden_stride_, rows, count, &norm_, thread);
  linear(head_.view, a, count, Epilogue::kStore, nullptr, logits, config_.vocab_size, thread);
  pool_.barrier();
  mark(kHead, thread);
}

void Model::forward(const Batch& b, bool all, float* logits) {
  begin(b);
  pool_.run([&](int thread) {
    layers(b, thread);
    const float* x = (const float*)x_.data;
    if (all)
      head(x, nullptr, b.total, logits, thread);
    else
      head(x, last_rows_.data(), b.sequences, logits, thread);
  });
}

void Model::score(const Batch& b, const int32_t* targets, float* out) {
  for (int t = 0; t < b.total; ++t)
    expect(targets[t] >= 0 && targets[t] < config_.vocab_size, "a target is outside the vocabulary");
  begin(b);
  const size_t needed = (size_t)kTokenBlock * config_.vocab_size * sizeof(float);
  if (logits_.bytes < needed) logits_ = Buffer(needed);
  float* logits = (float*)logits_.data;
  pool_.run([&](int thread) {
    layers(b, thread);
    for (int t = 0; t < b.total; t += kTokenBlock) {
      const int count = std::min(kTokenBlock, b.total - t);
      head((const float*)x_.data + (size_t)t * hidden_stride_, nullptr, count, logits, thread);
      for (int r = thread; r < count; r += pool_.size()) {
        const float* row = logits + (size_t)r * config_.vocab_size;
        out[t + r] = row[targets[t + r]] - ops_->log_sum_exp(row, config_.vocab_size);
      }
      pool_.barrier();
    }
    mark(kOther, thread);
  });
}

void Model::sample(const Batch& b, const Sampling& s, int32_t* out) {
  begin(b);
  const size_t needed = (size_t)b.sequences * config_.vocab_size * sizeof(float);
  if (logits_.bytes < needed) logits_ = Buffer(needed);
  float* logits = (float*)logits_.data;
  pool_.run([&](int thread) {
    layers(b, thread);
    head((const float*)x_.data, last_rows_.data(), b.sequences, logits, thread);
    for (int r = thread; r < b.sequences; r += pool_.size())
      out[r] = sample_token(logits + (size_t)r * config_.vocab_size, config_.vocab_size, s.temperature[r], s.top_k[r],
                            s.top_p[r], s.seeds[r], (int64_t)b.starts[r] + b.lengths[r]);
    mark(kOther, thread);
  });
}

}  // namespace flatout
