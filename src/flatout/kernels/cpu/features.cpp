#include "features.h"

#include <stdexcept>

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define FLATOUT_ISA portable
#include "kernels.h"
#undef FLATOUT_ISA
#if defined(__x86_64__)
#define FLATOUT_ISA avx2
#include "kernels.h"
#undef FLATOUT_ISA
#define FLATOUT_ISA avxvnni
#include "kernels.h"
#undef FLATOUT_ISA
#define FLATOUT_ISA avx512
#include "kernels.h"
#undef FLATOUT_ISA
#endif

namespace flatout {

namespace {

#if defined(__x86_64__)
// Linux hands out the tile registers on request (arch_prctl ARCH_REQ_XCOMP_PERM, feature 18 = tile data).
bool amx_usable() {
  static const bool usable = __builtin_cpu_supports("amx-int8") && __builtin_cpu_supports("amx-tile") &&
                             syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return usable;
}
bool avx512_usable() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
bool avx2_usable() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool avxvnni_usable() { return avx2_usable() && __builtin_cpu_supports("avxvnni"); }
#endif

}  // namespace

std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) found.push_back("avx2");
  if (__builtin_cpu_supports("fma")) found.push_back("fma");
  if (__builtin_cpu_supports("f16c")) found.push_back("f16c");
  if (__builtin_cpu_supports("avxvnni")) found.push_back("avx_vnni");
  if (__builtin_cpu_supports("avx512f")) found.push_back("avx512f");
  if (__builtin_cpu_supports("avx512bw")) found.push_back("avx512bw");
  if (__builtin_cpu_supports("avx512vnni")) found.push_back("avx512_vnni");
  if (__builtin_cpu_supports("avx512bf16")) found.push_back("avx512_bf16");
  if (amx_usable()) found.push_back("amx_int8");
#endif
  return found;
}

std::vector<std::string> usable_isas() {
  std::vector<std::string> isas;
#if defined(__x86_64__)
  if (avx512_usable() && __builtin_cpu_supports("avx512bf16") && amx_usable()) isas.push_back("amx");
  if (avx512_usable()) isas.push_back("avx512");
  if (avxvnni_usable()) isas.push_back("avxvnni");
  if (avx2_usable()) isas.push_back("avx2");
#endif
  isas.push_back("portable");
  return isas;
}

// One table: the kernels of namespace `isa`, with what differs given: preparing, tile set-up, linear and attention.
#define FLATOUT_TABLE(table, name, isa, prepare, begin, end, linear, attention)                                  \
  static const Ops table = {name,               isa::rms_norm,      isa::quantize,   isa::round_bf16,    prepare, \
                            begin,              end,                linear,          isa::screen_panels,          \
                            isa::at_least,      isa::collect_panel, isa::epilogue,   isa::gated,                  \
                            isa::bias_gelu,     isa::layer_norm,    isa::scale_columns, isa::rope,                \
                            isa::write_kv,      attention,          isa::merge_chunks,  isa::argmax,              \
                            isa::log_sum_exp,   isa::round_block,   isa::nearest_grid}

const Ops* ops_for(const std::string& isa) {
  bool usable = false;
  for (const std::string& name : usable_isas()) usable |= name == isa;
  if (!usable) throw std::invalid_argument("this processor cannot run instruction set '" + isa + "'");
#if defined(__x86_64__)
  FLATOUT_TABLE(amx_ops, "amx", avx512, avx512::prepare_panel, avx512::begin_linear, avx512::end_linear,
                avx512::linear_panels_amx, avx512::attend_amx);
  FLATOUT_TABLE(avx512_ops, "avx512", avx512, avx512::unpack_panel, nullptr, nullptr, avx512::linear_panels,
                avx512::attend);
  FLATOUT_TABLE(avx512_bf16_ops, "avx512", avx512, avx512::unpack_panel, nullptr, nullptr, avx512::linear_panels_bf16,
                avx512::attend);
  FLATOUT_TABLE(avxvnni_ops, "avxvnni", avx2, nullptr, nullptr, nullptr, avxvnni::linear_panels, avxvnni::attend);
  FLATOUT_TABLE(avx2_ops, "avx2", avx2, nullptr, nullptr, nullptr, avx2::linear_panels, avx2::attend);
  if (isa == "amx") return &amx_ops;
  if (isa == "avx512") return __builtin_cpu_supports("avx512bf16") ? &avx512_bf16_ops : &avx512_ops;
  if (isa == "avxvnni") return &avxvnni_ops;
  if (isa == "avx2") return &avx2_ops;
#endif
  FLATOUT_TABLE(portable_ops, "portable", portable, nullptr, nullptr, nullptr, portable::linear_panels, portable::attend);
  return &portable_ops;
}

}  // namespace flatout
