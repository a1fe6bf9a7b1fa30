#include "pool.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace astra::detail {
namespace {

// A call's units, of which every thread takes the next one until there are none.
struct Units {
  std::size_t count;
  void (*work)(void*, std::size_t);
  void* context;
  std::atomic<std::size_t> next{0};

  static void take(void* units) {
    auto& of = *static_cast<Units*>(units);
    for (;;) {
      const std::size_t unit = of.next.fetch_add(1, std::memory_order_relaxed);
      if (unit >= of.count) return;
      of.work(of.context, unit);
    }
  }
};

class Pool {
 public:
  // False if another call has the threads.
  bool run(unsigned threads, Units& units) {
    const std::unique_lock<std::mutex> call(call_, std::try_to_lock);
    if (!call.owns_lock()) return false;
    grow(threads - 1);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      units_ = &units;
      helpers_ = threads - 1 < started_ ? threads - 1 : started_;
      running_ = helpers_;
      ++job_;
    }
    start_.notify_all();
    Units::take(&units);
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
      Units* units = nullptr;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        start_.wait(lock, [&] { return job_ != seen && index < helpers_; });
        seen = job_;
        units = units_;
      }
      Units::take(units);
      const std::lock_guard<std::mutex> lock(mutex_);
      if (--running_ == 0) end_.notify_one();
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
  Units* units_ = nullptr;
};

#if defined(__unix__) || defined(__APPLE__)

// Never destroyed, as its threads outlive every static. A forked child has none of the threads and
// perhaps a locked mutex, so it makes a pool of its own.
Pool& pool() {
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
}

const pid_t loaded_by = getpid();

// A function of a library that somebody else has loaded, or null. What was found is kept.
template <typename Function>
Function loaded(std::atomic<Function>& kept, const char* name) {
  Function function = kept.load(std::memory_order_relaxed);
  if (function == nullptr) {
    function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
    kept.store(function, std::memory_order_relaxed);
  }
  return function;
}

// On the threads of GNU OpenMP, if somebody else has loaded it, as PyTorch does; else false. They
// keep their cores busy for milliseconds after their last work, in case there is more, and threads
// of our own would have to share the cores with them meanwhile. Not in a forked child, which may
// have none of them and their locks as they were.
bool run_on_openmp(unsigned threads, Units& units) {
  using Parallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
  static std::atomic<Parallel> parallel{nullptr};
  static std::atomic<int (*)()> most{nullptr};
  if (getpid() != loaded_by) return false;
  const auto run = loaded(parallel, "GOMP_parallel");
  const auto max_threads = loaded(most, "omp_get_max_threads");
  if (run == nullptr || max_threads == nullptr) return false;
  // Always the whole team: of a smaller one the other threads end, to be started again later.
  struct Team {
    Units& units;
    std::atomic<unsigned> places;
  } team{units, {threads}};
  run(
      [](void* data) {
        auto& of = *static_cast<Team*>(data);
        unsigned left = of.places.load(std::memory_order_relaxed);
        while (left != 0 && !of.places.compare_exchange_weak(left, left - 1)) {
        }
        if (left != 0) Units::take(&of.units);
      },
      &team, std::max(threads, static_cast<unsigned>(std::max(1, max_threads()))), 0);
  return true;
}

#else

Pool& pool() {
  static Pool* const pool = new Pool;
  return *pool;
}

bool run_on_openmp(unsigned, Units&) { return false; }

#endif

}  // namespace

void run_units(unsigned threads, std::size_t units, void (*work)(void*, std::size_t),
               void* context) {
  if (threads > units) threads = static_cast<unsigned>(units);
  if (threads > 1) {
    Units all{units, work, context};
    if (run_on_openmp(threads, all) || pool().run(threads, all)) return;
  }
  for (std::size_t unit = 0; unit < units; ++unit) work(context, unit);
}

}  // namespace astra::detail
