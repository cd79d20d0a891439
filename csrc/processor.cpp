#include "processor.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastllm {

#if defined(__x86_64__)

bool fast_bf16_dot() {
  constexpr unsigned kAmxBf16 = 1u << 22;  // leaf 7, sub-leaf 0, in edx
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kAmxBf16)) return true;
  return fast_bf16_pairs();
}

bool fast_bf16_pairs() {
  return __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512bf16");
}

#else

bool fast_bf16_dot() { return false; }
bool fast_bf16_pairs() { return false; }

#endif

}  // namespace fastllm
