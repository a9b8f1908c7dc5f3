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
  // Run task(thread) on every thread, the caller being thread 0; returns when all are done. Tasks must not throw.
  void run(const std::function<void(int)>& task);
  // Inside a task: wait until every thread has arrived.
  void barrier();

 private:
  void work(int thread);

  const int threads_;
  std::vector<std::thread> workers_;
  const std::function<void(int)>* task_ = nullptr;
  alignas(64) std::atomic<uint32_t> generation_{0};  // counts tasks; workers sleep on it
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace flatout
