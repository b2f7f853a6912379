// What every family of operators stands on: memory that threads keep, the pool, the processor's instructions.

#ifndef DETPOST_COMMON_H
#define DETPOST_COMMON_H

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <new>

#if defined(_WIN32)
#define DETPOST_EXPORT extern "C" __declspec(dllexport)
#else
#define DETPOST_EXPORT extern "C" __attribute__((visibility("default")))
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(DETPOST_PORTABLE)
#define DETPOST_HAS_V3 1  // instructions beyond the baseline that the processor may have
#include <immintrin.h>
#endif

// What a level compiles for itself stays in its level: a function that is not inlined might be shared between them.
#define DETPOST_INLINE static inline __attribute__((always_inline))

namespace detpost {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Of scores and logits.
enum DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Memory that a thread keeps between calls, in slots so that its parts never move each other.
class Scratch {
 public:
  template <typename T>
  T* take(int slot, size_t count) {
    const size_t bytes = count * sizeof(T) + 64;
    if (size_[slot] < bytes) grow(slot, bytes);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_[slot]) + 63) & ~uintptr_t(63));
  }
  // Gives back what is beyond `bytes`: a large volume must not stay allocated after its loss is computed.
  void trim(size_t bytes) {
    for (int slot = 0; slot < kSlots; ++slot) {
      if (size_[slot] <= bytes) continue;
      std::free(memory_[slot]);
      memory_[slot] = nullptr;
      size_[slot] = 0;
    }
  }
  ~Scratch() { trim(0); }

 private:
  void grow(int slot, size_t bytes) {
    std::free(memory_[slot]);
    memory_[slot] = std::malloc(bytes);
    size_[slot] = memory_[slot] ? bytes : 0;
    if (memory_[slot]) return;
    trim(0);  // whoever holds a part of this is unwound by what follows, and memory is short
    throw std::bad_alloc();
  }

  static constexpr int kSlots = 8;
  void* memory_[kSlots] = {};
  size_t size_[kSlots] = {};
};

// A job: `run(data, index)` for every index below `count`.
struct Job {
  void (*run)(const void* data, int64_t index);
  const void* data;
  int64_t count;
};

// How a call ended. Only numbers leave the library: Python's frames, a thread's end and OpenMP stop no exception.
enum Outcome : int { kDone = 0, kOutOfMemory = 1, kFailed = 2 };

template <typename Work>
int outcome_of(const Work& work) noexcept {
  try {
    work();
    return kDone;
  } catch (const std::bad_alloc&) {
    return kOutOfMemory;
  } catch (...) {
    return kFailed;
  }
}

// Runs a job on this thread and others, `threads` at the most; comes back when it is done. Throws what a task threw, when
// no other runs any more.
void parallel(const Job& job, int threads);

// The widest instructions that this processor has and DETPOST_NATIVE allows: 0 baseline, 2 AVX2, 3 AVX-512.
int level();

template <typename T>
void start(void (*run)(const void*, int64_t), const T& arguments, int64_t count, int threads) {
  parallel(Job{run, &arguments, count}, threads);
}

template <typename T>
T* at_level(T* baseline, T* avx2, T* avx512) {
  return level() == 3 ? avx512 : level() == 2 ? avx2 : baseline;
}

// For each mask of 8 lanes, the numbers of its set lanes, lowest first.
struct LaneTable {
  uint8_t lanes[256][8] = {};
  constexpr LaneTable() {
    for (int mask = 0; mask < 256; ++mask) {
      for (int lane = 0, count = 0; lane < 8; ++lane) {
        if (mask >> lane & 1) lanes[mask][count++] = static_cast<uint8_t>(lane);
      }
    }
  }
};
inline constexpr LaneTable kLaneTable;

// Keeps a product that a sum follows a rounded one: the compiler would fuse the two where the processor can, and peers do
// not. Nothing is computed by it.
template <typename T>
inline __attribute__((always_inline)) void hold(T& product) {
#if defined(__x86_64__)
  asm("" : "+v"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#else
  asm("" : "+m"(product));
#endif
}

}  // namespace detpost

#endif
