#include "threads.h"

#include <chrono>

namespace flatout {

static inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

using Clock = std::chrono::steady_clock;

// Between two steps the caller prepares the next one. Waking a parked thread takes 70 us here, a thirtieth of a token, so
// idle threads stay awake for a while, but offer their core to others.
constexpr auto kAwake = std::chrono::milliseconds(1);

// Another process may hold the core that the awaited thread needs: after this many rounds give ours away.
constexpr int kSpinRounds = 4000;

ThreadPool::ThreadPool(int threads) : threads_(threads), slots_(threads) {
  for (int t = 1; t < threads; ++t) workers_.emplace_back([this, t] { work(t); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  announce(0);
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::announce(int team) {
  const uint32_t next = (generation_.load(std::memory_order_relaxed) / kTeams + 1) * kTeams + (uint32_t)team;
  generation_.store(next, std::memory_order_release);
  generation_.notify_all();
}

void ThreadPool::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    const auto idle = [&] { return generation_.load(std::memory_order_acquire) == seen; };
    for (int i = 0; i < kSpinRounds && idle(); ++i) relax();
    for (const auto start = Clock::now(); idle() && Clock::now() - start < kAwake;) std::this_thread::yield();
    generation_.wait(seen, std::memory_order_acquire);
    seen = generation_.load(std::memory_order_acquire);
    if (stop_.load()) return;
    if (thread >= (int)(seen % kTeams)) continue;
    slots_[thread].barriers = crossed_;
    (*task_)(thread);
    barrier(thread);
    slots_[thread].left.store(seen, std::memory_order_release);
  }
}

void ThreadPool::run(const std::function<void(int)>& task, int team) {
  task_ = &task;
  if (team != team_) {
    // A thread that still tells others of the last barrier would overwrite what a new neighbour tells them.
    const uint32_t last = generation_.load(std::memory_order_relaxed);
    for (int t = 1; t < team_; ++t)
      while (slots_[t].left.load(std::memory_order_acquire) != last) std::this_thread::yield();
    team_ = team;
  }
  if (team > 1) {
    crossed_ = slots_[0].barriers;
    announce(team);
  }
  task(0);
  if (team > 1) barrier(0);
}

void ThreadPool::barrier(int thread) {
  Slot& mine = slots_[thread];
  const uint32_t reached = ++mine.barriers;
  for (int round = 0, step = 1; step < team_; ++round, step *= 2) {
    slots_[(thread + step) % team_].told[round].store(reached, std::memory_order_release);
    // The other may be ahead by one barrier, never behind: the difference wraps with the counters.
    for (int i = 0; (int32_t)(mine.told[round].load(std::memory_order_acquire) - reached) < 0; ++i) {
      if (i < kSpinRounds)
        relax();
      else
        std::this_thread::yield();
    }
  }
}

}  // namespace flatout
