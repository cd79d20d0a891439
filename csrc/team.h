// Threads that work through many short phases together. Waking threads costs more than a phase, so a
// team is woken once and its members meet at barriers.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastllm {

// Where all members wait for the last one.
class Barrier {
 public:
  explicit Barrier(int64_t shares) : shares_(shares) {}

  void wait(int64_t shares) {
    const uint64_t round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(shares, std::memory_order_acq_rel) + shares == shares_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int turns = 0; round_.load(std::memory_order_acquire) == round; ++turns) {
      // On a busy machine the last one may need this very processor.
      if (turns < kTurns) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  static constexpr int kTurns = 4000;  // 50 to 100 microseconds

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  const int64_t shares_;
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<uint64_t> round_{0};
};

// One thread of a team. The work is divided into shares, and a member has one share or, where
// PyTorch gave fewer threads than were asked for, several.
struct Member {
  Barrier& barrier;
  int64_t first_share, end_share, shares;

  bool leads() const { return first_share == 0; }
  void meet() const { barrier.wait(end_share - first_share); }
  // This member's part of `count` units.
  int64_t begin(int64_t count) const { return first_share * count / shares; }
  int64_t end(int64_t count) const { return end_share * count / shares; }
};

// Calls work(member) on every thread of a team of `threads`, all at the same time.
template <class Work>
void run_team(int64_t threads, Work work) {
  Barrier barrier(threads);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    work(Member{barrier, begin, end, threads});
  });
}

}  // namespace fastllm
