// The threads that the kernels share their work over.

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <thread>

#if !defined(_WIN32)
#include <unistd.h>
#endif

#include "common.h"

using namespace detpost;

namespace {

// A job that threads share: each takes the next task until none is left.
struct SharedJob {
  const Job& job;
  std::atomic<int64_t> next{0};
  std::atomic<int> outcome{kDone};

  void drain() noexcept {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < job.count;) {
      const int ended = outcome_of([&] { job.run(job.data, i); });
      if (ended == kDone) continue;
      outcome.store(ended, std::memory_order_relaxed);
      next.store(job.count, std::memory_order_relaxed);  // what is left would be thrown away
    }
  }
};

// Threads that wait for work, made once per process. One job at a time: a caller that finds the pool busy (another
// Python thread is inside) does its work alone instead of waiting.
class Pool {
 public:
  explicit Pool(int workers) {
    try {
      for (; workers_ < workers; ++workers_) std::thread([this, number = workers_] { work(number); }).detach();
    } catch (...) {  // the system has no thread more: those that are there do the work
    }
  }

  bool try_run(SharedJob& job, int helpers) {
    if (!busy_.try_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      helpers_ = active_ = helpers < workers_ ? helpers : workers_;
      ++generation_;
    }
    wake_.notify_all();
    job.drain();
    {
      std::unique_lock<std::mutex> lock(mutex_);
      done_.wait(lock, [this] { return active_ == 0; });
    }
    busy_.unlock();
    return true;
  }

 private:
  void work(int number) {
    uint64_t seen = 0;
    for (;;) {
      SharedJob* job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        if (number >= helpers_) continue;
        job = job_;
      }
      job->drain();
      std::lock_guard<std::mutex> lock(mutex_);
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_, done_;
  SharedJob* job_ = nullptr;  // on the stack of the caller, who waits
  int workers_ = 0, helpers_ = 0, active_ = 0;
  uint64_t generation_ = 0;
};

constexpr int kMostThreads = 64;

long process_number() {
#if defined(_WIN32)
  return 0;
#else
  return static_cast<long>(getpid());
#endif
}

// The pool of this process. A forked child inherits the memory of its parent's pool but none of its threads, so it
// makes its own; both are left to the end of the process, when joining threads would be too late.
Pool& pool() {
  static std::mutex mutex;
  static Pool* current = nullptr;
  static long owner = -1;
  const long process = process_number();
  std::lock_guard<std::mutex> lock(mutex);
  if (owner != process) {
    int count = static_cast<int>(std::thread::hardware_concurrency()) - 1;
    current = new Pool(count < 0 ? 0 : count >= kMostThreads ? kMostThreads - 1 : count);
    owner = process;
  }
  return *current;
}

// PyTorch's own threads, by the entry point of the OpenMP library that it runs on. After any of its operators these stay
// awake for some milliseconds, waiting for the next; threads of ours would have to share the processors with them.
using OpenMpParallel = void (*)(void (*run)(void*), void* data, unsigned threads, unsigned flags);
std::atomic<OpenMpParallel> openmp_parallel{nullptr};
std::atomic<long> openmp_process{-1};  // a forked child must not use them: its copies of the threads do not exist

void run_shared(void* job) { static_cast<SharedJob*>(job)->drain(); }

void run_with(SharedJob& job, int64_t helpers) {
  const OpenMpParallel shared_parallel = openmp_parallel.load(std::memory_order_relaxed);
  if (helpers > 0 && shared_parallel && openmp_process.load(std::memory_order_relaxed) == process_number()) {
    shared_parallel(run_shared, &job, static_cast<unsigned>(helpers + 1), 0);
    return;
  }
  if (helpers > 0 && pool().try_run(job, static_cast<int>(helpers))) return;
  job.drain();
}

}  // namespace

void detpost::parallel(const Job& job, int threads) {
  static const int available = static_cast<int>(std::thread::hardware_concurrency());  // asking reads a file of the system
  int64_t helpers = threads < available ? threads : available;
  helpers = (helpers < job.count ? helpers : job.count) - 1;
  if (helpers > kMostThreads - 1) helpers = kMostThreads - 1;
  SharedJob shared{job};
  run_with(shared, helpers);
  const int outcome = shared.outcome.load(std::memory_order_relaxed);
  if (outcome == kOutOfMemory) throw std::bad_alloc();
  if (outcome != kDone) throw std::runtime_error("a task failed");
}

// Takes the address of GOMP_parallel in the OpenMP library that PyTorch runs on.
DETPOST_EXPORT void detpost_share_threads(void* parallel_function) {
  openmp_process = process_number();
  openmp_parallel = reinterpret_cast<OpenMpParallel>(parallel_function);
}
