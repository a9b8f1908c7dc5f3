// A pool of threads that meet at spinning barriers: a decoded token crosses about 180 of them, so none may cost a
// system call. Between steps the workers spin briefly, then sleep.
#pragma once

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

namespace flatout {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return threads_; }
  // Run task(thread) on the first `team` threads, the caller being thread 0; returns when all are done. Tasks must not throw.
  void run(const std::function<void(int)>& task, int team);
  // Inside a task: `thread` waits until the whole team has arrived.
  void barrier(int thread);

 private:
  // A dissemination barrier (Hensgen, Finkel, Manber 1988): in round r thread t tells thread t + 2^r and waits for thread
  // t - 2^r, so that two threads exchange one cache line each way and n threads take log2(n) rounds.
  static constexpr int kMaxRounds = 10;  // 1,024 threads
  struct alignas(64) Slot {
    std::atomic<uint32_t> told[kMaxRounds] = {};  // the barrier that another thread has reached, each with one writer a team
    std::atomic<uint32_t> left = 0;               // the generation whose task and last barrier the thread has left
    uint32_t barriers = 0;                        // crossed so far; only its own thread looks at it
  };

  static constexpr uint32_t kTeams = 2048;

  void announce(int team);
  void work(int thread);

  const int threads_;
  std::vector<std::thread> workers_;
  const std::function<void(int)>* task_ = nullptr;
  int team_ = 1;          // of the task at hand; only its threads look at it
  uint32_t crossed_ = 0;  // barriers before the task at hand
  // Counts tasks, with the team's size in the lowest bits: one word, since a thread that is left out may look at any time.
  alignas(64) std::atomic<uint32_t> generation_{0};  // workers sleep on it
  std::vector<Slot> slots_;
  std::atomic<bool> stop_{false};
};

}  // namespace flatout
