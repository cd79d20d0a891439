#include "dispatch.h"

#include <cstdlib>
#include <iterator>
#include <memory>
#include <new>
#include <stdexcept>

namespace fastllm {
namespace {

struct Level {
  bool (*supported)();
  Kernels kernels;
};

#define FASTLLM_KERNELS(isa)                                                                  \
  Kernels {                                                                                   \
    #isa, isa::matmul, isa::packed_matmul, isa::rms_norm, isa::rope, isa::swiglu,             \
        isa::attention, isa::decode_attention, isa::linear_logprob, isa::sampling,            \
        isa::pairwise_loss, isa::optimizer                                                    \
  }

bool always() { return true; }

#if defined(__x86_64__)
// F16C is not asked for: every CPU with AVX2 has it, and older compilers do not know its name here.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

const Level kLevels[] = {
    {always, FASTLLM_KERNELS(baseline)},
#if defined(__x86_64__)
    {has_avx2, FASTLLM_KERNELS(avx2)},
    {has_avx512, FASTLLM_KERNELS(avx512)},
    {has_avx512_bf16, FASTLLM_KERNELS(avx512_bf16)},
#endif
};

const Kernels& best() {
  const Level* level = std::end(kLevels) - 1;
  while (!level->supported()) --level;
  return level->kernels;
}

const Kernels& named(const std::string& name) {
  std::string supported;
  for (const Level& level : kLevels) {
    if (!level.supported()) continue;
    if (name == level.kernels.isa) return level.kernels;
    supported += (supported.empty() ? "" : ", ") + std::string(level.kernels.isa);
  }
  throw std::runtime_error("FASTLLM_ISA: expected one that this CPU supports (" + supported +
                           "), found '" + name + "'");
}

const Kernels& choose() {
  const char* wanted = std::getenv("FASTLLM_ISA");
  return wanted && *wanted ? named(wanted) : best();
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

float* scratch(int64_t numbers) {
  constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, kAlignment); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t size = 0;
  if (size < numbers) {
    memory.reset(static_cast<float*>(::operator new(numbers * sizeof(float), kAlignment)));
    size = numbers;
  }
  return memory.get();
}

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (const Level& level : kLevels) names.push_back(level.kernels.isa);
  return names;
}

}  // namespace fastllm
