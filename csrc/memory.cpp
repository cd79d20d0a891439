#include "memory.h"

#include <climits>
#include <cstdint>
#include <cstdlib>

#if defined(__GLIBC__)
#include <malloc.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastllm {

bool keep_memory() {
#if defined(__GLIBC__)
  // Everything from the heap, which is never trimmed.
  return mallopt(M_MMAP_MAX, 0) == 1 && mallopt(M_TRIM_THRESHOLD, INT_MAX) == 1;
#else
  return false;
#endif
}

void prefer_large_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLarge = 2 << 20, kSmall = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kSmall - 1) / kSmall * kSmall;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kSmall * kSmall;
  // Advice only: a kernel without large pages says no, and nothing is lost.
  if (end > begin + kLarge) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace fastllm
