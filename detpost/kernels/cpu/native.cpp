// What detpost computes on a CPU, in C++: exact selection and the decode; erosion.h and distance.h hold the losses.
//
// A plain C interface, reached through ctypes (native.py): no Python or PyTorch headers, so one build serves every
// version of both. The kernels are compiled three times on x86-64, for the baseline, for AVX2 with FMA and for AVX-512, and
// the processor that runs them decides; elsewhere once, for the architecture's baseline (NEON on arm64). To that end
// levels.h includes this file and, with it, the headers of the losses. The pool of threads stands here for all of them.

#ifndef DETPOST_KERNELS

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <thread>

#if !defined(_WIN32)
#include <unistd.h>
#endif

#include "common.h"

using namespace detpost;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

enum DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
enum SizeType : int { kNoSizes = 0, kSizesFloat32 = 1, kSizesInt32 = 2, kSizesInt64 = 3 };
enum BoxFormat : int { kCxcywh = 0, kXyxy = 1, kXywh = 2 };

thread_local Scratch scratch;

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

namespace {

struct SelectArguments {
  const void* scores;  // (batch, width), contiguous
  int dtype;
  int64_t width, kept;
  int64_t* indices;  // (batch, kept)
};

struct DecodeArguments {
  const void* logits;  // (batch, queries, classes), contiguous
  int dtype;
  int64_t queries, classes, kept, background;  // background: a channel, or -1
  const float* boxes;                          // (batch, queries, 4), contiguous
  const void* sizes;                           // (batch, 2), (height, width)
  int size_type, box_format, clip, has_threshold;
  float threshold;
  float* out_scores;
  int64_t* out_labels;
  float* out_boxes;
  int64_t* out_queries;
  uint8_t* out_valid;
};

struct ErosionArguments {
  const float* pred;       // (batch, classes, depth, height, width), contiguous
  const int64_t* target;   // (batch, depth, height, width)
  int64_t classes, depth, height, width;  // depth 1 and `axes` 2 for images
  int axes;
  float stencil_weight;
  const double* weights;  // (steps)
  int steps;
  double* totals;        // (batch * classes): weighted sum over each field; or null
  float* field;          // as pred: the weighted sum of the erosions; or null
  const float* cotangent;  // as pred: gradient of `field`; or null for all ones
  float* gradient;         // as pred; or null
};

struct DistanceArguments {
  const void* values;  // (fields, depth, height, width): bytes, or float32 that are inside above the threshold
  int64_t depth, height, width;
  float steps[3];   // along depth, height, width
  int both_sides;   // distance to the other side from either, 0 where there is none
  float threshold;  // of the floats, with both sides
  float* out;       // squared distances
};

struct WeightedErrorArguments {
  const float* values;  // (fields, elements): probabilities, or logits with `sigmoid`
  const float* truth;
  const float* of_truth;  // squared distances of the truth's boundary
  float* of_values;       // those of the prediction's; overwritten with the gradient
  int64_t elements, chunks;  // of a field
  double exponent, factor;   // weight = factor * squared distance ^ exponent
  float limit;
  int sigmoid;
  double* sums;  // (fields, chunks)
};

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
[[maybe_unused]] constexpr LaneTable kLaneTable;

struct ScaleArguments {
  const float* values;   // (fields, elements)
  const float* factors;  // (fields)
  int64_t elements, chunks;
  float* out;
};

constexpr int64_t kRowsPerTask = 32;
constexpr int64_t kTile = 16;  // neighbouring lines that are worked on together

struct RowsPerTask {
  DistanceArguments of;
  int64_t rows;
};

// Lines along one axis: `out` as (outer, length, lanes), tiles of kTile neighbouring lines.
struct LinesPerTask {
  float* out;
  int64_t length, lanes;
  float step;
  int64_t tiles() const { return (lanes + kTile - 1) / kTile; }
};

}  // namespace

#define DETPOST_FAMILY "native.cpp"
#include "levels.h"

namespace {

int find_level() {
#if defined(DETPOST_HAS_V3)
  const char* asked = std::getenv("DETPOST_NATIVE");
  const int most = asked == nullptr ? 3 : std::strcmp(asked, "baseline") == 0 ? 0 : std::strcmp(asked, "avx2") == 0 ? 2 : 3;
  if (most < 2 || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return most == 3 && wide ? 3 : 2;
#else
  return 0;
#endif
}

}  // namespace

int detpost::level() {
  static const int found = find_level();
  return found;
}

DETPOST_EXPORT int detpost_scale(const float* values, const float* factors, int64_t fields, int64_t elements,
                                 float* out, int threads) {
  return outcome_of([&] {
    const int64_t chunks = (elements + (1 << 14) - 1) >> 14;
    const ScaleArguments arguments{values, factors, elements, chunks, out};
    start(DETPOST_BEST(scale_chunk), arguments, fields * chunks, fields * elements < (1 << 15) ? 1 : threads);
  });
}

// The least and the greatest of `count` numbers, at least one.
DETPOST_EXPORT void detpost_range(const int64_t* values, int64_t count, int64_t* range) {
  DETPOST_BEST(find_range)(values, count, range);
}

// Takes the address of GOMP_parallel in the OpenMP library that PyTorch runs on.
DETPOST_EXPORT void detpost_share_threads(void* parallel_function) {
  openmp_process = process_number();
  openmp_parallel = reinterpret_cast<OpenMpParallel>(parallel_function);
}

// Raised with every change of a signature below: native.py refuses another number.
DETPOST_EXPORT int detpost_interface() { return 6; }

DETPOST_EXPORT int detpost_level() { return level(); }

DETPOST_EXPORT int detpost_select(const void* scores, int dtype, int64_t batch, int64_t width, int64_t kept,
                                  int64_t* indices, int threads) {
  return outcome_of([&] {
    const SelectArguments arguments{scores, dtype, width, kept, indices};
    start(DETPOST_BEST(select_row), arguments, batch, batch * width < (1 << 16) ? 1 : threads);
  });
}

// All its arguments in one record of 8-byte numbers, addresses among them: ctypes spends longer on twenty arguments than
// the decode of an image does on selecting.
struct DecodeCall {
  int64_t logits, dtype, batch, queries, classes, kept, background, boxes, sizes, size_type, box_format, clip;
  int64_t out_scores, out_labels, out_boxes, out_queries, out_valid, threads, has_threshold;
  double threshold;
};

DETPOST_EXPORT int detpost_decode(const char* record) {
  return outcome_of([&] {
    DecodeCall call;
    std::memcpy(&call, record, sizeof call);
    const DecodeArguments arguments{reinterpret_cast<const void*>(call.logits),
                                    static_cast<int>(call.dtype),
                                    call.queries,
                                    call.classes,
                                    call.kept,
                                    call.background,
                                    reinterpret_cast<const float*>(call.boxes),
                                    reinterpret_cast<const void*>(call.sizes),
                                    static_cast<int>(call.size_type),
                                    static_cast<int>(call.box_format),
                                    static_cast<int>(call.clip),
                                    static_cast<int>(call.has_threshold),
                                    static_cast<float>(call.threshold),
                                    reinterpret_cast<float*>(call.out_scores),
                                    reinterpret_cast<int64_t*>(call.out_labels),
                                    reinterpret_cast<float*>(call.out_boxes),
                                    reinterpret_cast<int64_t*>(call.out_queries),
                                    reinterpret_cast<uint8_t*>(call.out_valid)};
    const bool small = call.batch * call.queries * call.classes < (1 << 16);
    start(DETPOST_BEST(decode_image), arguments, call.batch, small ? 1 : static_cast<int>(call.threads));
  });
}

DETPOST_EXPORT int detpost_erosion(const float* pred, const int64_t* target, int64_t batch, int64_t classes,
                                   int64_t depth, int64_t height, int64_t width, int axes, float stencil_weight,
                                   const double* weights, int steps, double* totals, float* field,
                                   const float* cotangent, float* gradient, int threads) {
  return outcome_of([&] {
    const ErosionArguments arguments{pred, target, classes, depth,  height, width,     axes,    stencil_weight,
                                     weights, steps, totals,  field, cotangent, gradient};
    start(DETPOST_BEST(erode_field), arguments, batch * classes, threads);
  });
}

DETPOST_EXPORT int detpost_distance(const void* values, int64_t fields, int64_t depth, int64_t height, int64_t width,
                                    float step_depth, float step_height, float step_width, int both_sides,
                                    float threshold, float* out, int threads) {
  return outcome_of([&] {
    const DistanceArguments arguments{values,     depth,     height, width, {step_depth, step_height, step_width},
                                      both_sides, threshold, out};
    const int64_t rows = fields * depth * height;
    if (rows * width < (1 << 14)) threads = 1;
    const RowsPerTask per_row{arguments, rows};
    start(DETPOST_BEST(distance_rows), per_row, (rows + kRowsPerTask - 1) / kRowsPerTask, threads);
    const LinesPerTask columns{out, height, width, step_height};
    start(DETPOST_BEST(distance_lines), columns, fields * depth * columns.tiles(), threads);
    if (depth > 1) {
      const LinesPerTask slices{out, depth, height * width, step_depth};
      start(DETPOST_BEST(distance_lines), slices, fields * slices.tiles(), threads);
    }
    const RowsPerTask finish{arguments, rows};
    if (both_sides) start(DETPOST_BEST(distance_finish), finish, (rows + kRowsPerTask - 1) / kRowsPerTask, threads);
  });
}

DETPOST_EXPORT int detpost_weighted_error(const float* values, const float* truth, const float* of_truth,
                                          float* of_values, int64_t fields, int64_t elements, int64_t chunks,
                                          double exponent, double factor, float limit, int sigmoid, double* sums,
                                          int threads) {
  return outcome_of([&] {
    const WeightedErrorArguments arguments{values,   truth,  of_truth, of_values, elements, chunks,
                                           exponent, factor, limit,    sigmoid,   sums};
    start(DETPOST_BEST(weighted_error), arguments, fields * chunks, fields * elements < (1 << 14) ? 1 : threads);
  });
}

#else  // the kernels, once per instruction set

#define DETPOST_INLINE static inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(DETPOST_REGISTER)));
typedef int32_t Ints __attribute__((vector_size(DETPOST_REGISTER)));

constexpr int64_t kLanes = DETPOST_REGISTER / 4;

DETPOST_INLINE void load(Floats& to, const float* from) { std::memcpy(&to, from, sizeof to); }
DETPOST_INLINE void store(float* to, const Floats& from) { std::memcpy(to, &from, sizeof from); }
DETPOST_INLINE void fill(Floats& to, float value) { to = value - (Floats){}; }

DETPOST_INLINE float greatest_lane(const Floats& values) {
  float best = values[0];
  for (int lane = 1; lane < kLanes; ++lane) best = values[lane] > best ? values[lane] : best;
  return best;
}

// The lanes of a comparison that hold, lowest bit first.
DETPOST_INLINE uint32_t lane_bits(const Ints& mask) {
#if DETPOST_REGISTER == 64
  return static_cast<uint32_t>(_mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)));
#elif DETPOST_REGISTER == 32
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#elif defined(DETPOST_HAS_V3)
  return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(mask)));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= static_cast<uint32_t>(mask[lane] & 1) << lane;
  return bits;
#endif
}

DETPOST_INLINE bool any_lane(const Ints& mask) { return lane_bits(mask) != 0; }

// ---------------------------------------------------------------------------------------------------------------------
// Selection
// ---------------------------------------------------------------------------------------------------------------------

// An ascending integer order over the floats that a descending one over the scores follows. Zeros are one number.
DETPOST_INLINE uint32_t descending_key(float value) {
  value = value == 0.0f ? 0.0f : value;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t ordered = bits ^ ((bits >> 31) ? 0xFFFFFFFFu : 0x80000000u);
  return value != value ? 0xFFFFFFFFu : ~ordered;
}

DETPOST_INLINE float value_of_key(uint32_t key) {
  const uint32_t ordered = ~key;
  const uint32_t bits = ordered ^ ((ordered >> 31) ? 0x80000000u : 0xFFFFFFFFu);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The least key such that `wanted` of the `count` keys are no greater, or, if `slack` allows, one somewhat above it with
// at most `slack` further keys below. Radix selection, from the highest bits down. 1 <= wanted <= count.
static uint32_t select_key(const uint32_t* keys, int64_t count, int64_t wanted, int64_t slack) {
  static const int kShifts[3] = {21, 10, 0};
  static const int kBits[3] = {11, 11, 10};
  uint32_t prefix = 0;
  int64_t below = 0;  // keys under the prefix's range
  for (int pass = 0; pass < 3; ++pass) {
    uint32_t histogram[2048] = {};
    const int shift = kShifts[pass], bits = kBits[pass];
    const uint32_t mask = (1u << bits) - 1;
    for (int64_t i = 0; i < count; ++i) {
      const bool inside = pass == 0 || (keys[i] >> (shift + bits)) == (prefix >> (shift + bits));
      histogram[(keys[i] >> shift) & mask] += inside;
    }
    uint32_t bin = 0;
    while (below + histogram[bin] < wanted) below += histogram[bin++];
    prefix |= bin << shift;
    if (below + histogram[bin] <= wanted + slack) return prefix | ((1u << shift) - 1);
  }
  return prefix;
}

// Stable ascending radix sort of (key, index) pairs; the result is in the first pair of arrays.
static void sort_pairs(uint32_t* keys, uint32_t* indices, uint32_t* other_keys, uint32_t* other_indices,
                       int64_t count) {
  uint32_t starts[4][256] = {};
  for (int64_t i = 0; i < count; ++i) {
    for (int digit = 0; digit < 4; ++digit) ++starts[digit][(keys[i] >> (8 * digit)) & 255];
  }
  uint32_t *from_keys = keys, *from = indices, *to_keys = other_keys, *to = other_indices;
  for (int digit = 0; digit < 4; ++digit) {
    uint32_t* start = starts[digit];
    if (count == 0 || start[(from_keys[0] >> (8 * digit)) & 255] == count) continue;  // one digit for all
    uint32_t sum = 0;
    for (int value = 0; value < 256; ++value) {
      const uint32_t here = start[value];
      start[value] = sum;
      sum += here;
    }
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t place = start[(from_keys[i] >> (8 * digit)) & 255]++;
      to_keys[place] = from_keys[i];
      to[place] = from[i];
    }
    uint32_t* swap = from_keys; from_keys = to_keys; to_keys = swap;
    swap = from; from = to; to = swap;
  }
  if (from_keys != keys) {
    std::memcpy(keys, from_keys, count * sizeof *keys);
    std::memcpy(indices, from, count * sizeof *indices);
  }
}

constexpr int64_t kBlock = 128;  // elements whose maximum is kept, to pass over them later

// A bound that at least `kept` of the row's numbers reach, and few more; -inf where fewer than `kept` are numbers.
// Of any partition of the row, the kept-th greatest maximum of its parts is such a bound.
static float lower_bound_of_best(const float* row, int64_t width, int64_t kept, float* block_maxima) {
  const int64_t blocks = width / kBlock;
  const int64_t parts = (2 * kept + 2 * kLanes - 1) / (2 * kLanes);  // of two registers each
  const int64_t blocks_per_part = blocks / parts;
  if (blocks_per_part == 0) return -kInfinity;
  const int64_t count = (blocks + blocks_per_part - 1) / blocks_per_part * 2 * kLanes;
  uint32_t* keys = scratch.take<uint32_t>(1, count);
  int64_t made = 0;
  for (int64_t first = 0; first < blocks; first += blocks_per_part) {
    const int64_t last = first + blocks_per_part < blocks ? first + blocks_per_part : blocks;
    Floats even_part, odd_part;
    fill(even_part, -kInfinity);
    fill(odd_part, -kInfinity);
    for (int64_t block = first; block < last; ++block) {
      Floats even, odd, values;
      fill(even, -kInfinity);
      fill(odd, -kInfinity);
      for (int64_t i = 0; i < kBlock; i += 2 * kLanes) {
        load(values, row + block * kBlock + i);
        even = values > even ? values : even;  // false for NaN, which is passed over
        load(values, row + block * kBlock + i + kLanes);
        odd = values > odd ? values : odd;
      }
      even_part = even > even_part ? even : even_part;
      odd_part = odd > odd_part ? odd : odd_part;
      block_maxima[block] = greatest_lane(even > odd ? even : odd);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      keys[made++] = descending_key(even_part[lane]);
      keys[made++] = descending_key(odd_part[lane]);
    }
  }
  return value_of_key(select_key(keys, made, kept, kept / 4));
}

// Appends the indices of what reaches the bound in row[first, last), without a branch per element, and gives the new
// count. Writes up to 8 places beyond it.
DETPOST_INLINE int64_t collect(const float* row, int64_t first, int64_t last, float bound, uint32_t* found,
                               int64_t count) {
  int64_t i = first;
#if DETPOST_FMA
  const __m256 bounds = _mm256_set1_ps(bound);
  for (; i + 8 <= last; i += 8) {
    const int mask = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(row + i), bounds, _CMP_GE_OQ));
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kLaneTable.lanes[mask]));
    const __m256i places = _mm256_add_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_set1_epi32(static_cast<int>(i)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(found + count), places);
    count += __builtin_popcount(static_cast<unsigned>(mask));
  }
#endif
  for (; i < last; ++i) {
    found[count] = static_cast<uint32_t>(i);
    count += row[i] >= bound;
  }
  return count;
}

// Puts the indices of the best `kept` of the row into `best`: score descending, then index ascending, NaN last.
static void select_best(const float* row, int64_t width, int64_t kept, uint32_t* best) {
  const int64_t blocks = width / kBlock;
  float* block_maxima = scratch.take<float>(2, blocks + 1);
  const float bound = lower_bound_of_best(row, width, kept, block_maxima);
  const bool skips = bound > -kInfinity;
  uint32_t* found = scratch.take<uint32_t>(3, width + 8);
  int64_t count = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    if (skips && block_maxima[block] < bound) continue;
    count = collect(row, block * kBlock, (block + 1) * kBlock, bound, found, count);
  }
  count = collect(row, blocks * kBlock, width, bound, found, count);

  uint32_t* keys = scratch.take<uint32_t>(5, 2 * count + 1);
  for (int64_t i = 0; i < count; ++i) keys[i] = descending_key(row[found[i]]);
  if (count > kept + kept / 2) {  // too many to sort: all below the kept-th key, then the first that equal it
    const uint32_t last = select_key(keys, count, kept, 0);
    int64_t under = 0, room = kept;
    for (int64_t i = 0; i < count; ++i) room -= keys[i] < last;
    for (int64_t i = 0; i < count; ++i) {
      const bool equals = keys[i] == last && room > 0;
      room -= equals;
      if (keys[i] < last || equals) {
        keys[under] = keys[i];
        found[under++] = found[i];
      }
    }
    count = under;
  }
  uint32_t* spare = scratch.take<uint32_t>(6, count + 1);
  sort_pairs(keys, found, keys + count, spare, count);
  int64_t done = count < kept ? count : kept;
  std::memcpy(best, found, done * sizeof *best);
  for (int64_t i = 0; i < width && done < kept; ++i) {
    if (row[i] != row[i]) best[done++] = static_cast<uint32_t>(i);
  }
}

DETPOST_INLINE float widen_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7FFF;
  uint32_t bits;
  float value;
  if (rest >= 0x7C00) {  // infinities and NaN
    bits = sign | 0x7F800000u | ((rest & 0x3FF) << 13);
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  bits = rest << 13;  // the exponent is 112 short, which a product mends for normal and subnormal numbers alike
  std::memcpy(&value, &bits, sizeof value);
  value *= 5.192296858534828e33f;  // 2 ** 112
  std::memcpy(&bits, &value, sizeof bits);
  bits |= sign;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

DETPOST_INLINE float element(const void* data, int dtype, int64_t i) {
  if (dtype == kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t narrow = static_cast<const uint16_t*>(data)[i];
  if (dtype == kFloat16) return widen_half(narrow);
  const uint32_t bits = static_cast<uint32_t>(narrow) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// A row as float32: itself, or a widened copy.
static const float* as_float_row(const void* data, int dtype, int64_t row, int64_t width) {
  if (dtype == kFloat32) return static_cast<const float*>(data) + row * width;
  const uint16_t* narrow = static_cast<const uint16_t*>(data) + row * width;
  float* wide = scratch.take<float>(0, width);
  int64_t i = 0;
  if (dtype == kBFloat16) {
    for (; i < width; ++i) {
      const uint32_t bits = static_cast<uint32_t>(narrow[i]) << 16;
      std::memcpy(wide + i, &bits, sizeof bits);
    }
    return wide;
  }
#if DETPOST_FMA
  for (; i + 8 <= width; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(narrow + i));
    _mm256_storeu_ps(wide + i, _mm256_cvtph_ps(halves));
  }
#endif
  for (; i < width; ++i) wide[i] = widen_half(narrow[i]);
  return wide;
}

static void select_row(const void* data, int64_t row) {
  const SelectArguments& of = *static_cast<const SelectArguments*>(data);
  uint32_t* best = scratch.take<uint32_t>(7, of.kept);
  select_best(as_float_row(of.scores, of.dtype, row, of.width), of.width, of.kept, best);
  int64_t* out = of.indices + row * of.kept;
  for (int64_t i = 0; i < of.kept; ++i) out[i] = best[i];
}

// ---------------------------------------------------------------------------------------------------------------------
// The decode: sigmoid scores, the k best of all query and class pairs
// ---------------------------------------------------------------------------------------------------------------------

DETPOST_INLINE float size_element(const DecodeArguments& of, int64_t i) {
  if (of.size_type == kSizesFloat32) return static_cast<const float*>(of.sizes)[i];
  if (of.size_type == kSizesInt32) return static_cast<float>(static_cast<const int32_t*>(of.sizes)[i]);
  return static_cast<float>(static_cast<const int64_t*>(of.sizes)[i]);
}

// As torch: a NaN stays one.
DETPOST_INLINE float clamp_to(float value, float limit) {
  value = value < 0.0f ? 0.0f : value;
  return value > limit || limit != limit ? limit : value;
}

DETPOST_INLINE void decode_box(const DecodeArguments& of, const float* box, float width, float height, float* out) {
  float x1 = box[0], y1 = box[1], x2 = box[2], y2 = box[3];
  if (of.box_format == kCxcywh) {
    const float half_width = 0.5f * box[2], half_height = 0.5f * box[3];
    x1 = box[0] - half_width, y1 = box[1] - half_height, x2 = box[0] + half_width, y2 = box[1] + half_height;
  } else if (of.box_format == kXywh) {
    x2 = box[0] + box[2], y2 = box[1] + box[3];
  }
  if (of.size_type != kNoSizes) x1 *= width, y1 *= height, x2 *= width, y2 *= height;
  if (of.clip) {
    x1 = clamp_to(x1, width), y1 = clamp_to(y1, height), x2 = clamp_to(x2, width), y2 = clamp_to(y2, height);
  }
  out[0] = x1, out[1] = y1, out[2] = x2, out[3] = y2;
}

// exp(x) for |x| <= 708 to about 1e-15 of it: 2^n times the series of the rest. Written so that a compiler takes several
// at a time, and equal numbers come out equal wherever they stand.
DETPOST_INLINE double exponential(double x) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it leaves the nearest integer in the low bits
  const double shifted = x * 1.4426950408889634 + kRound;
  const double n = shifted - kRound;
  const double r = (x - n * 0.6931471805598903) - n * 5.497923018708371e-14;
  double series = 1.0 / 6227020800.0;
  series = series * r + 1.0 / 479001600.0;
  series = series * r + 1.0 / 39916800.0;
  series = series * r + 1.0 / 3628800.0;
  series = series * r + 1.0 / 362880.0;
  series = series * r + 1.0 / 40320.0;
  series = series * r + 1.0 / 5040.0;
  series = series * r + 1.0 / 720.0;
  series = series * r + 1.0 / 120.0;
  series = series * r + 1.0 / 24.0;
  series = series * r + 1.0 / 6.0;
  series = series * r + 0.5;
  series = series * r + 1.0;
  series = series * r + 1.0;
  int64_t bits, power;
  std::memcpy(&bits, &series, sizeof bits);
  std::memcpy(&power, &shifted, sizeof power);
  bits += power << 52;
  std::memcpy(&series, &bits, sizeof series);
  return series;
}

// In double, so that equal logits score alike and as in the plain form. `count` is a multiple of 8.
static void sigmoids(const float* logits, int64_t count, float* scores) {
  for (int64_t i = 0; i < count; ++i) {
    double x = -static_cast<double>(logits[i]);
    x = x > 708.0 ? 708.0 : x;
    x = x < -708.0 ? -708.0 : x;
    scores[i] = static_cast<float>(1.0 / (1.0 + exponential(x)));
  }
}

static void decode_image(const void* data, int64_t image) {
  const DecodeArguments& of = *static_cast<const DecodeArguments*>(data);
  const int64_t width = of.queries * of.classes;
  const float* row = as_float_row(of.logits, of.dtype, image, width);
  if (of.background >= 0) {  // NaN is never ahead of a number and never valid
    float* foreground = scratch.take<float>(0, width);
    if (foreground != row) std::memcpy(foreground, row, width * sizeof *row);
    for (int64_t i = of.background; i < width; i += of.classes) foreground[i] = std::numeric_limits<float>::quiet_NaN();
    row = foreground;
  }
  uint32_t* best = scratch.take<uint32_t>(7, of.kept);
  select_best(row, width, of.kept, best);

  const float image_height = of.size_type == kNoSizes ? 1.0f : size_element(of, 2 * image);
  const float image_width = of.size_type == kNoSizes ? 1.0f : size_element(of, 2 * image + 1);
  const float* boxes = of.boxes + image * of.queries * 4;
  const uint32_t classes = static_cast<uint32_t>(of.classes);
  const int64_t padded = (of.kept + 7) / 8 * 8;
  float* logits = scratch.take<float>(1, 2 * padded);
  float* scores = logits + padded;
  for (int64_t i = 0; i < padded; ++i) logits[i] = i < of.kept ? row[best[i]] : 0.0f;
  sigmoids(logits, padded, scores);
  for (int64_t i = 0; i < of.kept; ++i) {
    const int64_t slot = image * of.kept + i;
    const float logit = logits[i], score = scores[i];
    const uint32_t query = best[i] / classes;
    const bool valid = logit == logit && (!of.has_threshold || score > of.threshold);
    float box[4];
    decode_box(of, boxes + 4 * query, image_width, image_height, box);
    of.out_scores[slot] = valid ? score : 0.0f;
    of.out_labels[slot] = valid ? static_cast<int64_t>(best[i] - query * classes) : -1;
    of.out_queries[slot] = valid ? static_cast<int64_t>(query) : -1;
    of.out_valid[slot] = valid;
    for (int side = 0; side < 4; ++side) of.out_boxes[4 * slot + side] = valid ? box[side] : 0.0f;
  }
}

#include "erosion.h"
#include "distance.h"

#undef DETPOST_INLINE
#endif
