#include "threads.h"

namespace flatout {

static inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Another process may hold the core that the awaited thread needs: after this many rounds give ours away.
constexpr int kSpinRounds = 4000;

ThreadPool::ThreadPool(int threads) : threads_(threads) {
  for (int t = 1; t < threads; ++t) workers_.emplace_back([this, t] { work(t); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    for (int i = 0; i < kSpinRounds && generation_.load(std::memory_order_acquire) == seen; ++i) relax();
    generation_.wait(seen, std::memory_order_acquire);
    ++seen;
    if (stop_.load()) return;
    (*task_)(thread);
    barrier();
  }
}

void ThreadPool::run(const std::function<void(int)>& task) {
  task_ = &task;
  generation_.fetch_add(1, std::memory_order_release);
  if (threads_ > 1) generation_.notify_all();
  task(0);
  barrier();
}

void ThreadPool::barrier() {
  if (threads_ == 1) return;
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int i = 0; phase_.load(std::memory_order_acquire) == phase; ++i) {
    if (i < kSpinRounds)
      relax();
    else
      std::this_thread::yield();
  }
}

}  // namespace flatout
