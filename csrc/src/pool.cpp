#include "pool.hpp"

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace astra::detail {
namespace {

class Pool {
 public:
  // False if another call has the threads.
  bool run(unsigned threads, std::size_t units, void (*work)(void*, std::size_t), void* context) {
    const std::unique_lock<std::mutex> call(call_, std::try_to_lock);
    if (!call.owns_lock()) return false;
    grow(threads - 1);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      work_ = work;
      context_ = context;
      units_ = units;
      next_.store(0, std::memory_order_relaxed);
      helpers_ = threads - 1 < started_ ? threads - 1 : started_;
      running_ = helpers_;
      ++job_;
    }
    start_.notify_all();
    take_units();
    std::unique_lock<std::mutex> lock(mutex_);
    end_.wait(lock, [this] { return running_ == 0; });
    return true;
  }

 private:
  void grow(unsigned wanted) {
    try {
      for (; started_ < wanted; ++started_) {
        std::thread([this, index = started_] { help(index); }).detach();
      }
    } catch (const std::system_error&) {
      // The system gives no more threads: those there are do the work.
    }
  }

  void help(unsigned index) {
    std::uint64_t seen = 0;
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        start_.wait(lock, [&] { return job_ != seen && index < helpers_; });
        seen = job_;
      }
      take_units();
      const std::lock_guard<std::mutex> lock(mutex_);
      if (--running_ == 0) end_.notify_one();
    }
  }

  void take_units() {
    for (;;) {
      const std::size_t unit = next_.fetch_add(1, std::memory_order_relaxed);
      if (unit >= units_) return;
      work_(context_, unit);
    }
  }

  std::mutex call_;  // held for the whole of a call
  std::mutex mutex_;
  std::condition_variable start_;
  std::condition_variable end_;
  std::uint64_t job_ = 0;
  unsigned started_ = 0;
  unsigned helpers_ = 0;
  unsigned running_ = 0;
  std::atomic<std::size_t> next_{0};
  std::size_t units_ = 0;
  void (*work_)(void*, std::size_t) = nullptr;
  void* context_ = nullptr;
};

// Never destroyed, as its threads outlive every static. A forked child has none of the threads and
// perhaps a locked mutex, so it makes a pool of its own.
Pool& pool() {
#if defined(__unix__) || defined(__APPLE__)
  static std::mutex guard;
  static std::atomic<Pool*> pool{nullptr};
  static std::atomic<pid_t> owner{0};
  const pid_t here = getpid();
  if (owner.load(std::memory_order_acquire) != here) {
    // Only the first call of a process comes here.
    const std::lock_guard<std::mutex> lock(guard);
    if (owner.load(std::memory_order_relaxed) != here) {
      pool.store(new Pool, std::memory_order_release);
      owner.store(here, std::memory_order_release);
    }
  }
  return *pool.load(std::memory_order_acquire);
#else
  static Pool* const pool = new Pool;
  return *pool;
#endif
}

}  // namespace

void run_units(unsigned threads, std::size_t units, void (*work)(void*, std::size_t),
               void* context) {
  if (threads > units) threads = static_cast<unsigned>(units);
  if (threads > 1 && pool().run(threads, units, work, context)) return;
  for (std::size_t unit = 0; unit < units; ++unit) work(context, unit);
}

}  // namespace astra::detail
