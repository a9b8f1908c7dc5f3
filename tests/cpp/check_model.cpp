// The whole engine on tiny random models: every instruction set must give the same bits with 1, 2 and 3 threads, however
// the work was batched. For machines where the Python tests cannot run, and for the thread sanitizer. Prints a digest that
// must be the same on every processor; exits with 1 when something is wrong.
#include <algorithm>
#include <cmath>
#include <set>

#include "checks.h"
#include "cpu/features.h"
#include "cpu/model.h"

using namespace flatout;
using Tokens = std::vector<int32_t>;

constexpr int kPrompts[] = {1, 7, 150, 300};  // a matrix of one row, less than a tile, by tokens on 2 threads and on 3
constexpr int kSequences = 4, kColumns = 8;

static Config config_of(bool options) {
  Config c = {};
  c.vocab_size = 512, c.hidden_size = 64, c.intermediate_size = 128, c.num_layers = 2;
  c.num_heads = 4, c.num_kv_heads = 2, c.head_dim = 16, c.max_positions = kColumns * kPage;
  c.rope_theta = 10000.0f, c.rms_norm_eps = 1e-5f, c.embedding_scale = 1.0f;
  c.cache_kind = options ? CacheKind::kBFloat16 : CacheKind::kInt8;
  if (options) c.qkv_bias = c.qk_norm = c.gelu = true, c.norm_offset = 1.0f, c.embedding_scale = 8.0f, c.sliding_window = 270;
  return c;
}

struct Weight {
  std::vector<uint8_t> codes;
  Floats scales;
  std::vector<uint16_t> half_scales;
  Source source;
};

// 8-bit codes with a scale a row, or with a half a group of 32 columns.
static Weight random_weight(int n, int k, bool grouped) {
  Weight w;
  w.codes.resize((size_t)n * k);
  for (uint8_t& code : w.codes) code = (uint8_t)(random_bits() % 255 - 127);
  for (int i = 0; i < n * (grouped ? k / 32 : 1); ++i) {
    const int mantissa = random_bits() % 1024;
    w.half_scales.push_back((uint16_t)(5 << 10 | mantissa));
    w.scales.push_back(std::ldexp(1.0f + (float)mantissa / 1024, 5 - 15));
  }
  Source& s = w.source;
  s.kind = WeightKind::kInteger, s.n = n, s.k = k, s.bits = 8, s.planes = 1;
  s.group = s.activation_group = grouped ? 32 : 0, s.half_scales = grouped;
  s.codes = w.codes.data(), s.scales = grouped ? (const void*)w.half_scales.data() : w.scales.data();
  return w;
}

// Every model gets the same weights: those that follow from the same state.
static void fill(Model& model, const Config& c) {
  state = 1;
  const int q = c.num_heads * c.head_dim, qkv = q + 2 * c.num_kv_heads * c.head_dim;
  const auto weight = [&](const std::string& name, int n, int k) {
    model.set_weight(name, random_weight(n, k, false).source);
  };
  const auto vector = [&](const std::string& name, int n) { model.set_vector(name, random_floats(n).data(), n); };
  const Weight embedding = random_weight(c.vocab_size, c.hidden_size, true);
  model.set_weight("embedding", embedding.source);
  for (int i = 0; i < c.num_layers; ++i) {
    const std::string at = "layers." + std::to_string(i) + ".";
    weight(at + "qkv", qkv, c.hidden_size);
    weight(at + "o", c.hidden_size, q);
    weight(at + "gate_up", 2 * c.intermediate_size, c.hidden_size);
    weight(at + "down", c.hidden_size, c.intermediate_size);
    vector(at + "input_norm", c.hidden_size);
    vector(at + "post_norm", c.hidden_size);
    if (c.qkv_bias) vector(at + "qkv_bias", qkv);
    if (c.qk_norm) vector(at + "q_norm", c.head_dim), vector(at + "k_norm", c.head_dim);
  }
  vector("norm", c.hidden_size);
  model.tie_head();
  model.finalize();
}

// New tokens of some sequences. Pages of the sequences alternate.
struct Step {
  Tokens tokens, starts, lengths, pages;
  void add(int sequence, int start, const Tokens& of) {
    tokens.insert(tokens.end(), of.begin(), of.end());
    starts.push_back(start), lengths.push_back((int)of.size());
    for (int p = 0; p < kColumns; ++p) pages.push_back(p * kSequences + sequence);
  }
  Batch batch() const {
    return {tokens.data(), starts.data(), lengths.data(), pages.data(), (int)tokens.size(), (int)starts.size(), kColumns};
  }
};
static Tokens random_tokens(int count) {
  Tokens tokens(count);
  for (int32_t& token : tokens) token = (int32_t)(random_bits() % 512);
  return tokens;
}

struct Results {
  Floats values;
  Tokens tokens;
};

static Results results_of(const std::string& isa, int threads, bool options) {
  const std::string who = isa + ", " + std::to_string(threads) + " threads" + (options ? ", all options" : "");
  const Config c = config_of(options);
  Model model(c, threads, isa, kSequences * kColumns);
  fill(model, c);
  state = 2;
  Results results;
  const auto logits_of = [&](const Step& step, bool all) {
    Floats logits((all ? step.tokens.size() : step.starts.size()) * c.vocab_size);
    model.forward(step.batch(), all, logits.data());
    results.values.insert(results.values.end(), logits.begin(), logits.end());
    return logits;
  };
  const Floats temperatures = {0.0f, 0.0f, 0.8f, 1.0f}, top_p = {1.0f, 1.0f, 0.9f, 1.0f};
  const Tokens top_k = {0, 0, 0, 50};
  const std::vector<uint64_t> seeds = {1, 2, 3, 4};
  const auto sample = [&](const Step& step, bool all) {
    Tokens found(all ? step.tokens.size() : step.starts.size());
    model.sample(step.batch(), {temperatures.data(), top_p.data(), top_k.data(), seeds.data()}, all, found.data());
    results.tokens.insert(results.tokens.end(), found.begin(), found.end());
    return found;
  };

  // Prompts, each followed by greedy decoding. The last one's context is longer than a chunk of attention.
  int at[kSequences];
  Tokens last(kSequences);
  for (int s = 0; s < kSequences; ++s) {
    Step prompt;
    prompt.add(s, 0, random_tokens(kPrompts[s]));
    logits_of(prompt, true);
    last[s] = sample(prompt, false)[0];
    at[s] = kPrompts[s];
    for (int i = 0; i < (options ? 4 : 20); ++i, ++at[s]) {
      Step step;
      step.add(s, at[s], {last[s]});
      const Floats logits = logits_of(step, false);
      last[s] = sample(step, false)[0];
      expect(last[s] == std::max_element(logits.begin(), logits.end()) - logits.begin(), who + ": not the greatest logit");
      expect(model.screened() > 0, who + ": the head was not screened");
    }
  }

  // All together, one token each, then several, some of them sampled: what each of them gives alone.
  const Tokens lengths[] = {{1, 1, 1, 1}, {1, 1, 1, 1}, {1, 2, 5, 1}, {3, 40, 1, 150}};
  for (const Tokens& length : lengths) {
    Step step;
    std::vector<Step> alone(kSequences);
    for (int s = 0; s < kSequences; ++s) {
      Tokens tokens = random_tokens(length[s]);
      tokens[0] = last[s];
      step.add(s, at[s], tokens), alone[s].add(s, at[s], tokens);
      at[s] += length[s];
    }
    const Floats together = logits_of(step, false);
    last = sample(step, false);
    sample(step, true);
    for (int s = 0; s < kSequences; ++s) {
      const Floats own = logits_of(alone[s], false);
      expect(std::memcmp(own.data(), &together[(size_t)s * c.vocab_size], own.size() * 4) == 0,
             who + ": sequence " + std::to_string(s) + " gives other bits alone");
    }
    Floats scores(step.tokens.size());
    model.score(step.batch(), random_tokens((int)scores.size()).data(), scores.data());
    results.values.insert(results.values.end(), scores.begin(), scores.end());
  }
  for (float value : results.values)
    if (!std::isfinite(value)) return expect(false, who + ": a value is not a number"), results;
  expect(std::set<int32_t>(results.tokens.begin(), results.tokens.end()).size() > 20, who + ": always the same tokens");
  return results;
}

int main() {
  start_digest();
  for (bool options : {false, true}) {
    Results first;
    for (const std::string& isa : usable_isas())
      for (int threads : {1, 2, 3}) {
        const Results results = results_of(isa, threads, options);
        if (first.values.empty()) first = results;
        const std::string who = isa + " with " + std::to_string(threads) + " threads gives other ";
        expect(std::memcmp(results.values.data(), first.values.data(), first.values.size() * 4) == 0, who + "bits");
        expect(results.tokens == first.tokens, who + "tokens");
        std::fprintf(stderr, "%s, %d threads: %d wrong\n", isa.c_str(), threads, failures);
      }
    add_to_digest(first.values);
    add_to_digest(first.tokens);
  }
  std::printf("digest %016llx\n", (unsigned long long)digest);
  return failures ? 1 : 0;
}
