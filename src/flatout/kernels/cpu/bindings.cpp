// Python bindings of the CPU engine. Arrays are checked here; the model checks what they mean.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "encoder.h"
#include "features.h"
#include "handover.h"
#include "model.h"

namespace nb = nanobind;
using namespace flatout;

void bind_ceilings(nb::module_& m);

namespace {

template <class T>
using Array = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Matrix = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Cube = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using AnyMatrix = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T>
using Result = nb::ndarray<nb::numpy, T>;

template <class T>
T get(const nb::dict& d, const char* key) {
  if (!d.contains(key)) throw std::invalid_argument(std::string("config lacks ") + key);
  return nb::cast<T>(d[key]);
}

CacheKind cache_kind(const std::string& name) {
  if (name == "int8") return CacheKind::kInt8;
  if (name == "bf16") return CacheKind::kBFloat16;
  if (name == "fp32") return CacheKind::kFloat32;
  throw std::invalid_argument("no cache of format " + name);
}

Config parse_config(const nb::dict& d) {
  Config c{};
  c.vocab_size = get<int>(d, "vocab_size");
  c.hidden_size = get<int>(d, "hidden_size");
  c.intermediate_size = get<int>(d, "intermediate_size");
  c.num_layers = get<int>(d, "num_layers");
  c.num_heads = get<int>(d, "num_heads");
  c.num_kv_heads = get<int>(d, "num_kv_heads");
  c.head_dim = get<int>(d, "head_dim");
  c.max_positions = get<int>(d, "max_positions");
  c.rope_theta = get<float>(d, "rope_theta");
  c.rms_norm_eps = get<float>(d, "rms_norm_eps");
  c.norm_offset = get<float>(d, "norm_offset");
  c.embedding_scale = get<float>(d, "embedding_scale");
  c.qkv_bias = get<bool>(d, "qkv_bias");
  c.qk_norm = get<bool>(d, "qk_norm");
  c.gelu = get<std::string>(d, "activation") == "gelu_tanh";
  c.cache_kind = cache_kind(get<std::string>(d, "kv_cache"));
  c.sliding_window = d["sliding_window"].is_none() ? 0 : get<int>(d, "sliding_window");
  c.has_rope_scaling = !d["rope_scaling"].is_none();
  if (c.has_rope_scaling) {
    const nb::dict s = nb::cast<nb::dict>(d["rope_scaling"]);
    c.rope_scaling = {get<float>(s, "factor"), get<float>(s, "low_freq_factor"), get<float>(s, "high_freq_factor"),
                      get<float>(s, "original_max_positions")};
  }
  return c;
}

Batch make_batch(const Array<int32_t>& tokens, const Array<int32_t>& starts, const Array<int32_t>& lengths,
                 const Matrix<int32_t>& pages) {
  if (starts.shape(0) != lengths.shape(0) || starts.shape(0) != pages.shape(0))
    throw std::invalid_argument("starts, lengths and pages must have one row a sequence");
  return {tokens.data(), starts.data(), lengths.data(), pages.data(), (int)tokens.shape(0), (int)starts.shape(0),
          (int)pages.shape(1)};
}

template <class T>
Result<T> result(std::initializer_list<size_t> shape, T** data) {
  size_t count = 1;
  for (size_t n : shape) count *= n;
  *data = new T[count];
  nb::capsule owner(*data, [](void* p) noexcept { delete[] (T*)p; });
  return Result<T>(*data, shape, owner);
}

bool is_half(const AnyMatrix& a) {
  if (a.dtype() == nb::dtype<float>()) return false;
  if (a.dtype().code == (uint8_t)nb::dlpack::dtype_code::Float && a.dtype().bits == 16) return true;
  throw std::invalid_argument("scales and minima must be float16 or float32");
}

void check_rows(const AnyMatrix& a, const Source& s, const char* what) {
  const size_t groups = s.group ? s.k / s.group : 1;
  if (a.shape(0) != (size_t)s.n || a.shape(1) != groups)
    throw std::invalid_argument(std::string(what) + " must have one value a row and group");
}

// The caller's arrays as a Source; it borrows them.
Source quantized_source(const AnyMatrix& codes, const AnyMatrix& scales, const nb::object& zeros_object,
                        const nb::object& minima_object, int bits, int group, const std::string& zero,
                        const std::string& activation, int activation_group, bool byte_scales) {
  Source s;
  s.kind = WeightKind::kInteger;
  s.n = (int)codes.shape(0);
  s.k = (int)codes.shape(1);
  s.bits = bits;
  s.group = group;
  if (bits < 4 || bits > 8 || bits == 7) throw std::invalid_argument("codes have 4, 5, 6 or 8 bits");
  if (codes.itemsize() != 1) throw std::invalid_argument("codes must be bytes");
  if (group < 0 || (group && (s.k % group || group % 32)) || (bits == 4 && group == 0))
    throw std::invalid_argument("the group must be a multiple of 32 that divides the width");
  if (activation != "int8" && activation != "int16") throw std::invalid_argument("activations are int8 or int16");
  if (activation_group != 0 && activation_group != group)
    throw std::invalid_argument("the activation group is 0 or the weight group");
  s.planes = activation == "int8" ? 1 : 2;
  s.zero = zero == "minimum" ? Zero::kMinimum : zero == "asymmetric" ? Zero::kAsymmetric : Zero::kSymmetric;
  if (s.zero == Zero::kMinimum && s.planes == 2)
    throw std::invalid_argument("weights with a float minimum take int8 activations");
  s.half_scales = is_half(scales);
  if (byte_scales && !s.half_scales) throw std::invalid_argument("scales that pack into bytes are float16");
  s.byte_scales = byte_scales;
  s.activation_group = activation_group;
  s.codes = (const uint8_t*)codes.data();
  s.scales = scales.data();
  check_rows(scales, s, "scales");
  if (s.zero == Zero::kAsymmetric) {
    const AnyMatrix zeros = nb::cast<AnyMatrix>(zeros_object);
    check_rows(zeros, s, "zeros");
    if (zeros.itemsize() != 1) throw std::invalid_argument("zeros must be bytes");
    s.zeros = (const uint8_t*)zeros.data();
  }
  if (s.zero == Zero::kMinimum) {
    const AnyMatrix minima = nb::cast<AnyMatrix>(minima_object);
    check_rows(minima, s, "minima");
    if (is_half(minima) != s.half_scales) throw std::invalid_argument("minima must have the type of the scales");
    s.minima = minima.data();
  }
  return s;
}

// A model or an encoder with the weights that are on their way into it.
template <class M>
struct Loading : M {
  using M::M;
  Handover handover;

  void hand_over(const std::string& name, const Source& s, std::vector<nb::object> arrays, size_t bytes) {
    handover.push([this, name, s] { this->set_weight(name, s); }, std::move(arrays), bytes);
  }
  void finalize() {
    handover.finish();
    M::finalize();
  }
};

template <class M>
void set_quantized(Loading<M>& model, const std::string& name, const AnyMatrix& codes, const AnyMatrix& scales,
                   const nb::object& zeros, const nb::object& minima, int bits, int group, const std::string& zero,
                   const std::string& activation, int activation_group, bool byte_scales) {
  const Source s =
      quantized_source(codes, scales, zeros, minima, bits, group, zero, activation, activation_group, byte_scales);
  model.hand_over(name, s, {nb::cast(codes), nb::cast(scales), zeros, minima}, codes.nbytes());
}

// Rows of GGUF blocks: Q4_0 (4 bits, symmetric), Q4_1 (4, minimum) or Q8_0 (8, symmetric).
void set_blocks(Loading<Model>& model, const std::string& name, const Matrix<uint8_t>& blocks, int bits,
                const std::string& zero) {
  Source s;
  s.kind = WeightKind::kInteger;
  s.bits = bits;
  s.group = s.activation_group = 32;
  s.zero = zero == "minimum" ? Zero::kMinimum : Zero::kSymmetric;
  s.half_scales = true;
  s.planes = 1;
  s.n = (int)blocks.shape(0);
  s.k = (int)(blocks.shape(1) / s.block_bytes() * 32);
  s.blocks = blocks.data();
  if ((bits != 4 && bits != 8) || blocks.shape(1) % s.block_bytes())
    throw std::invalid_argument("rows must be whole blocks of 4 or 8 bits");
  model.hand_over(name, s, {nb::cast(blocks)}, blocks.nbytes());
}

Source float_source(const Matrix<float>& values, const std::string& format) {
  Source s;
  s.kind = format == "bf16" ? WeightKind::kBFloat16 : WeightKind::kFloat32;
  s.bits = format == "bf16" ? 16 : 32;
  s.n = (int)values.shape(0);
  s.k = (int)values.shape(1);
  s.values = values.data();
  return s;
}

template <class M>
void set_matrix(Loading<M>& model, const std::string& name, const Matrix<float>& values, const std::string& format) {
  model.hand_over(name, float_source(values, format), {nb::cast(values)}, values.nbytes());
}

// The methods by which weights are handed over; matrices are packed later (`Handover`).
template <class M>
void bind_weights(nb::class_<Loading<M>>& c) {
  c.def("set_float", [](Loading<M>& m, const std::string& name, const Array<float>& v, const std::string&) {
     m.set_vector(name, v.data(), (int)v.shape(0));
   })
      .def("set_float", &set_matrix<M>)
      .def("set_quantized", &set_quantized<M>, nb::arg("name"), nb::arg("codes"), nb::arg("scales"),
           nb::arg("zeros").none(), nb::arg("minima").none(), nb::arg("bits"), nb::arg("group"), nb::arg("zero"),
           nb::arg("activation"), nb::arg("activation_group"), nb::arg("byte_scales") = false)
      .def("finalize", &Loading<M>::finalize)
      .def_prop_ro("isa", [](const Loading<M>& m) { return m.isa(); })
      .def_prop_ro("weight_bytes", [](const Loading<M>& m) { return m.weight_bytes(); });
}

EncoderConfig parse_encoder_config(const nb::dict& d) {
  EncoderConfig c{};
  c.vocab_size = get<int>(d, "vocab_size");
  c.hidden_size = get<int>(d, "hidden_size");
  c.intermediate_size = get<int>(d, "intermediate_size");
  c.num_layers = get<int>(d, "num_layers");
  c.num_heads = get<int>(d, "num_heads");
  c.head_dim = get<int>(d, "head_dim");
  c.max_positions = get<int>(d, "max_positions");
  c.layer_norm_eps = get<float>(d, "layer_norm_eps");
  c.cache_kind = cache_kind(get<std::string>(d, "kv_cache"));
  return c;
}

Pooling parse_pooling(const std::string& name) {
  if (name == "none") return Pooling::kNone;
  if (name == "mean") return Pooling::kMean;
  if (name == "cls") return Pooling::kFirst;
  throw std::invalid_argument("pooling is none, mean or cls");
}

using Values = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// kernels/rounding.py and kernels/grids.py say what the arrays of these two mean.
void round_columns(const std::string& isa, const Matrix<float>& values, const nb::object& base_object,
                   const Matrix<float>& factor, const Array<float>& gain, const Array<int32_t>& groups,
                   const Matrix<float>& steps, const Matrix<float>& low, const Matrix<float>& high, Values levels,
                   Values errors) {
  const size_t columns = values.shape(0), rows = values.shape(1);
  const auto same = [&](const auto& a) { return a.shape(0) == columns && a.shape(1) == rows; };
  const auto bounds = [&](const Matrix<float>& a) { return a.shape(0) == steps.shape(0) && a.shape(1) == rows; };
  RoundBlock b;
  if (!base_object.is_none()) {
    const auto base = nb::cast<Matrix<float>>(base_object, false);
    if (!same(base)) throw std::invalid_argument("values and base have one shape");
    b.base = base.data();
  }
  if (columns > kMostColumns || !same(levels) || !same(errors) || !bounds(steps) || !bounds(low) || !bounds(high))
    throw std::invalid_argument("a block has at most 128 columns, and a value for each of its rows everywhere");
  if (factor.shape(0) != columns || factor.shape(1) != columns || gain.shape(0) != columns || groups.shape(0) != columns)
    throw std::invalid_argument("factor is square, and each column has a gain and a group");
  for (size_t j = 0; j < columns; ++j)
    if (groups.data()[j] < 0 || (size_t)groups.data()[j] >= steps.shape(0))
      throw std::invalid_argument("groups are rows of steps");
  b.columns = (int)columns, b.rows = rows;
  b.values = values.data(), b.factor = factor.data(), b.gain = gain.data(), b.groups = groups.data();
  b.steps = steps.data(), b.low = low.data(), b.high = high.data();
  b.levels = levels.data(), b.errors = errors.data();
  const Ops* ops = ops_for(isa);
  nb::gil_scoped_release release;
  for (size_t first = 0; first < rows; first += kBlockRows)
    ops->round_block(b, (int)first, (int)std::min<size_t>(kBlockRows, rows - first));
}

Result<int32_t> nearest_grids(const std::string& isa, const Cube& weights, const nb::object& importance_object,
                              const Cube& steps, const Cube& zeros, float low, float high) {
  const size_t rows = weights.shape(0), groups = weights.shape(1), width = weights.shape(2);
  for (const Cube* a : {&steps, &zeros})
    if (a->shape(0) != steps.shape(0) || a->shape(1) != rows || a->shape(2) != groups)
      throw std::invalid_argument("each candidate has a step and a zero a row and group");
  Grids g;
  const float* importance = nullptr;
  if (!importance_object.is_none()) {
    const auto given = nb::cast<Matrix<float>>(importance_object, false);
    if (given.shape(0) != groups || given.shape(1) != width)
      throw std::invalid_argument("importance has a value a column");
    importance = given.data();
  }
  g.width = (int)width, g.candidates = (int)steps.shape(0), g.stride = rows * groups, g.low = low, g.high = high;
  const Ops* ops = ops_for(isa);
  int32_t* out;
  auto found = result<int32_t>({rows, groups}, &out);
  nb::gil_scoped_release release;
  for (size_t i = 0; i < rows * groups; ++i) {
    g.weights = weights.data() + i * width;
    g.importance = importance ? importance + i % groups * width : nullptr;
    g.steps = steps.data() + i, g.zeros = zeros.data() + i;
    out[i] = ops->nearest_grid(g);
  }
  return found;
}

Result<float> run_linear(const std::string& isa, const Matrix<float>& x, const Source& s) {
  if (x.shape(1) != (size_t)s.k) throw std::invalid_argument("x must be as wide as the weight");
  float* out;
  auto result_array = result<float>({x.shape(0), (size_t)s.n}, &out);
  linear_once(*ops_for(isa), s, x.data(), (int)x.shape(0), out);
  return result_array;
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.doc() = "The flatout CPU engine: packed weights, paged KV cache, forward steps.";
  m.attr("max_step_tokens") = kMaxStepTokens;
  m.attr("page_size") = kPage;
  m.def("features", &cpu_features);
  m.def("isas", &usable_isas);
  bind_ceilings(m);
  // One linear by itself, for comparing kernels with their reference.
  m.def("linear_quantized",
        [](const std::string& isa, const Matrix<float>& x, const AnyMatrix& codes, const AnyMatrix& scales,
           const nb::object& zeros, const nb::object& minima, int bits, int group, const std::string& zero,
           const std::string& activation, int activation_group, bool byte_scales) {
          return run_linear(isa, x, quantized_source(codes, scales, zeros, minima, bits, group, zero, activation,
                                                     activation_group, byte_scales));
        },
        nb::arg("isa"), nb::arg("x"), nb::arg("codes"), nb::arg("scales"), nb::arg("zeros").none(),
        nb::arg("minima").none(), nb::arg("bits"), nb::arg("group"), nb::arg("zero"), nb::arg("activation"),
        nb::arg("activation_group"), nb::arg("byte_scales") = false);
  m.def("linear_float", [](const std::string& isa, const Matrix<float>& x, const Matrix<float>& weight,
                           const std::string& format) { return run_linear(isa, x, float_source(weight, format)); });
  // Elementwise kernels of the encoder, row by row, likewise.
  m.def("bias_gelu", [](const std::string& isa, const Matrix<float>& x, const Array<float>& bias) {
    const int rows = (int)x.shape(0), n = (int)x.shape(1);
    if (bias.shape(0) != x.shape(1)) throw std::invalid_argument("one bias a column");
    float* out;
    auto result_array = result<float>({x.shape(0), x.shape(1)}, &out);
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < n; i += kLanes) {
        const int lanes = std::min(kLanes, n - i);
        float tile[kLanes] = {};
        std::copy_n(x.data() + (size_t)r * n + i, lanes, tile);
        ops_for(isa)->bias_gelu(tile, 1, lanes, bias.data() + i, out + (size_t)r * n + i, n);
      }
    return result_array;
  });
  m.def("layer_norm", [](const std::string& isa, const Matrix<float>& x, const Array<float>& weight,
                         const Array<float>& bias, float eps) {
    const int n = (int)x.shape(1);
    if (weight.shape(0) != x.shape(1) || bias.shape(0) != x.shape(1))
      throw std::invalid_argument("one weight and one bias a column");
    float* out;
    auto result_array = result<float>({x.shape(0), x.shape(1)}, &out);
    for (size_t r = 0; r < x.shape(0); ++r)
      ops_for(isa)->layer_norm(x.data() + r * n, weight.data(), bias.data(), eps, n, out + r * n);
    return result_array;
  });
  m.attr("max_block_columns") = kMostColumns;
  m.def("round_block", &round_columns, nb::arg("isa"), nb::arg("values"), nb::arg("base").none(), nb::arg("factor"),
        nb::arg("gain"), nb::arg("groups"), nb::arg("steps"), nb::arg("low"), nb::arg("high"), nb::arg("levels"),
        nb::arg("errors"));
  m.def("nearest_grids", &nearest_grids, nb::arg("isa"), nb::arg("weights"), nb::arg("importance").none(),
        nb::arg("steps"), nb::arg("zeros"), nb::arg("low"), nb::arg("high"));
  nb::class_<Loading<Encoder>> encoder(m, "Encoder");
  bind_weights<Encoder>(encoder);
  encoder
      .def("__init__",
           [](Loading<Encoder>* self, const nb::dict& config, int threads, const std::string& isa) {
             if (threads < 1 || threads > 1024) throw std::invalid_argument("threads must be between 1 and 1024");
             new (self) Loading<Encoder>(parse_encoder_config(config), threads, isa);
           })
      .def("forward", [](Loading<Encoder>& self, Array<int32_t> tokens, Array<int32_t> starts, const std::string& pooling,
                         bool normalize) {
        const Sequences b{tokens.data(), starts.data(), (int)tokens.shape(0), (int)starts.shape(0)};
        const Pooling kind = parse_pooling(pooling);
        float* out;
        auto states = result<float>({kind == Pooling::kNone ? tokens.shape(0) : starts.shape(0),
                                     (size_t)self.config().hidden_size}, &out);
        nb::gil_scoped_release release;
        self.forward(b, kind, normalize, out);
        return states;
      });
  // How many threads a model's steps take, for tests.
  nb::class_<Pace>(m, "Pace").def(nb::init<int>()).def("team", &Pace::team).def("took", &Pace::took);
  nb::class_<Loading<Model>> model(m, "Model");
  bind_weights<Model>(model);
  model
      .def("__init__",
           [](Loading<Model>* self, const nb::dict& config, int threads, const std::string& isa, int num_pages) {
             if (threads < 1 || threads > 1024) throw std::invalid_argument("threads must be between 1 and 1024");
             new (self) Loading<Model>(parse_config(config), threads, isa, num_pages);
           })
      .def("set_blocks", &set_blocks, nb::arg("name"), nb::arg("blocks"), nb::arg("bits"), nb::arg("zero"))
      .def("tie_head", [](Loading<Model>& m) { m.handover.push([&m] { m.tie_head(); }, {}, 0); })
      .def_prop_ro("num_pages", [](const Loading<Model>& m) { return m.num_pages(); })
      .def_prop_ro("screened", [](const Loading<Model>& m) { return m.screened(); })
      .def_prop_ro("page_size", [](const Loading<Model>&) { return kPage; })
      .def("forward",
           [](Loading<Model>& self, Array<int32_t> tokens, Array<int32_t> starts, Array<int32_t> lengths,
              Matrix<int32_t> pages, bool all) {
             const Batch b = make_batch(tokens, starts, lengths, pages);
             float* out;
             auto logits = result<float>(
                 {(size_t)(all ? b.total : b.sequences), (size_t)self.config().vocab_size}, &out);
             nb::gil_scoped_release release;
             self.forward(b, all, out);
             return logits;
           })
      .def("score",
           [](Loading<Model>& self, Array<int32_t> tokens, Array<int32_t> starts, Array<int32_t> lengths,
              Matrix<int32_t> pages, Array<int32_t> targets) {
             const Batch b = make_batch(tokens, starts, lengths, pages);
             if (targets.shape(0) != tokens.shape(0)) throw std::invalid_argument("one target a token");
             float* out;
             auto scores = result<float>({(size_t)b.total}, &out);
             nb::gil_scoped_release release;
             self.score(b, targets.data(), out);
             return scores;
           })
      .def("sample",
           [](Loading<Model>& self, Array<int32_t> tokens, Array<int32_t> starts, Array<int32_t> lengths,
              Matrix<int32_t> pages, Array<float> temperature, Array<int32_t> top_k, Array<float> top_p,
              Array<uint64_t> seeds, bool all) {
             const Batch b = make_batch(tokens, starts, lengths, pages);
             const size_t n = b.sequences;
             if (temperature.shape(0) != n || top_k.shape(0) != n || top_p.shape(0) != n || seeds.shape(0) != n)
               throw std::invalid_argument("sampling parameters must have one value a sequence");
             int32_t* out;
             auto tokens_out = result<int32_t>({(size_t)(all ? b.total : b.sequences)}, &out);
             const Sampling s{temperature.data(), top_p.data(), top_k.data(), seeds.data()};
             nb::gil_scoped_release release;
             self.sample(b, s, all, out);
             return tokens_out;
           })
      .def("profile", [](Loading<Model>& self, bool on) { self.set_profiling(on); })
      .def("timings", [](Loading<Model>& self) {
        const std::vector<double> t = self.take_timings();
        nb::dict d;
        for (int i = 0; i < kPhases; ++i) d[kPhaseNames[i]] = t[i];
        return d;
      });
}
