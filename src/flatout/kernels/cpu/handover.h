// Weights that Python hands over are packed by a thread of their own, which needs no interpreter: whoever makes the next
// weight ready, or the tokenizer, keeps it, instead of passing it to and fro once a weight, up to 5 ms a time.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace flatout {

// Runs tasks one after another in the order they came. Arrays that tasks read are let go by whoever calls, which has the
// interpreter.
class Handover {
 public:
  Handover() = default;
  Handover(const Handover&) = delete;
  Handover& operator=(const Handover&) = delete;
  ~Handover() {  // what has not begun is dropped
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    if (thread_.joinable()) thread_.join();
  }

  // Takes over a task that reads `bytes` of `arrays`, once there is room; one that reads more than kMost is done on return.
  // Throws what an earlier task threw; after that none is run.
  void push(std::function<void()> run, std::vector<nanobind::object> arrays, size_t bytes) {
    if (!thread_.joinable()) thread_ = std::thread([this] { work(); });
    bytes = std::max<size_t>(bytes, 1);
    wait([&] { return bytes_ == 0 || bytes_ + bytes <= kMost; });
    {
      std::lock_guard lock(mutex_);
      bytes_ += bytes;
      waiting_.push_back({std::move(run), std::move(arrays), bytes});
    }
    changed_.notify_all();
    if (bytes > kMost) finish();
  }

  // Returns when all are done; throws what one of them threw.
  void finish() {
    wait([&] { return bytes_ == 0; });
  }

 private:
  static constexpr size_t kMost = 8 << 20;  // what has been read from a file stays in memory until it is packed

  struct Task {
    std::function<void()> run;
    std::vector<nanobind::object> arrays;
    size_t bytes;
  };

  // The interpreter is given up only where there is something to wait for.
  template <class Condition>
  void wait(Condition condition) {
    bool met;
    {
      std::lock_guard lock(mutex_);
      met = condition();
    }
    if (!met) {
      nanobind::gil_scoped_release release;
      std::unique_lock lock(mutex_);
      changed_.wait(lock, condition);
    }
    std::vector<nanobind::object> read;
    std::exception_ptr error;
    {
      std::lock_guard lock(mutex_);
      std::swap(read, read_);
      error = error_;
    }
    if (error) std::rethrow_exception(error);
  }

  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return stop_ || !waiting_.empty(); });
      if (stop_) return;
      Task task = std::move(waiting_.front());
      waiting_.pop_front();
      const bool skip = (bool)error_;
      lock.unlock();
      std::exception_ptr error;
      if (!skip) try {
          task.run();
        } catch (...) {
          error = std::current_exception();
        }
      lock.lock();
      if (error) error_ = error;
      bytes_ -= task.bytes;
      for (nanobind::object& array : task.arrays) read_.push_back(std::move(array));
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Task> waiting_;
  std::vector<nanobind::object> read_;
  std::exception_ptr error_;
  size_t bytes_ = 0;  // of what is waiting or at work
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace flatout
