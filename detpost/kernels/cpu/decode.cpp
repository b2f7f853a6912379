// From raw logits and boxes to detections.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "common.h"
#include "decode_call.h"

using namespace detpost;

namespace {

thread_local Scratch scratch;

// Queries whose keys are made together: a multiple of what any register holds.
constexpr int64_t kQueriesAtOnce = 32;

// exp(-i * step) in two parts, whose sum has twice the digits.
template <int kCount>
struct Exponentials {
  float high[kCount], low[kCount];
  explicit Exponentials(double step) {
    for (int i = 0; i < kCount; ++i) {
      const double value = std::exp(-i * step);
      high[i] = static_cast<float>(value);
      low[i] = static_cast<float>(value - high[i]);
    }
  }
};

// The tables of detpost/reference/softmax.py: exp(-i / 16), 0 at 64, and exp(-i / 4096). No entry is so near to where
// float32 rounds the other way that it depended on the library that computes it. Then what makes an entry of the first
// without looking it up: exp of whole numbers of logits, of fours, of halves and of sixteenths.
struct SoftmaxTables {
  float coarse[1025], fine[256];
  Exponentials<32> logits{1.0};
  Exponentials<8> fours{4.0}, halves{0.5};
  Exponentials<16> sixteenths{1 / 16.0};
  SoftmaxTables() {
    for (int i = 0; i < 1024; ++i) coarse[i] = static_cast<float>(std::exp(-i / 16.0));
    for (int i = 0; i < 256; ++i) fine[i] = static_cast<float>(std::exp(-i / 4096.0));
    coarse[1024] = 0.0f;
  }
};
const SoftmaxTables kSoftmaxTables;

struct DecodeArguments {
  const void* logits;  // (batch, queries, classes)
  int dtype, activation, selection;
  int64_t stride, queries, classes, kept, background;  // stride: between queries; background: a channel, or -1
  const float* boxes;                                  // (batch, queries, 4)
  int64_t boxes_stride;
  const void* sizes;                           // (batch, 2), (height, width)
  int size_type, box_format, clip, out_format, has_threshold;
  float threshold;
  float* out_scores;
  int64_t* out_labels;
  float* out_boxes;
  int64_t* out_queries;
  uint8_t* out_valid;
  // Where pairs are not chosen by the logits themselves: in how many parts the keys of an image are made, and how many
  // places they and the labels take. `keys`, `labels`: made for all images before, or null.
  int64_t parts = 0, keys_stride = 0, labels_stride = 0;
  float* keys = nullptr;
  uint32_t* labels = nullptr;
};

void lay_out_keys(DecodeArguments& of) {
  const bool by_query = of.selection == kPerQuery;
  if (!by_query && of.activation != kSoftmax) return;
  of.parts = (of.queries + kQueriesAtOnce - 1) / kQueriesAtOnce;
  of.keys_stride = of.parts * kQueriesAtOnce * (by_query ? 1 : of.classes);
  of.labels_stride = by_query ? of.parts * kQueriesAtOnce : 0;
}

}  // namespace

#define DETPOST_FAMILY "decode.h"
#include "levels.h"

namespace {

// Keys that several threads make are the caller's to hold: a thread's own scratch is what it works with.
thread_local Scratch shared;

}  // namespace

DETPOST_EXPORT int detpost_decode(const char* record) {
  return outcome_of([&] {
    DecodeCall call;
    std::memcpy(&call, record, sizeof call);
    DecodeArguments arguments{reinterpret_cast<const void*>(call.logits),
                                    static_cast<int>(call.dtype),
                                    static_cast<int>(call.activation),
                                    static_cast<int>(call.selection),
                                    call.logits_stride,
                                    call.queries,
                                    call.classes,
                                    call.kept,
                                    call.background,
                                    reinterpret_cast<const float*>(call.boxes),
                                    call.boxes_stride,
                                    reinterpret_cast<const void*>(call.sizes),
                                    static_cast<int>(call.size_type),
                                    static_cast<int>(call.box_format),
                                    static_cast<int>(call.clip),
                                    static_cast<int>(call.out_format),
                                    static_cast<int>(call.has_threshold),
                                    static_cast<float>(call.threshold),
                                    reinterpret_cast<float*>(call.out_scores),
                                    reinterpret_cast<int64_t*>(call.out_labels),
                                    reinterpret_cast<float*>(call.out_boxes),
                                    reinterpret_cast<int64_t*>(call.out_queries),
                                    reinterpret_cast<uint8_t*>(call.out_valid)};
    lay_out_keys(arguments);
    const int64_t numbers = call.batch * call.queries * call.classes;
    const bool weighs = call.activation == kSoftmax;
    // A weight takes several times as long as a comparison, and only then is it worth to wake a thread for fewer.
    const int threads = numbers < (weighs ? 1 << 13 : 1 << 16) ? 1 : static_cast<int>(call.threads);
    if (weighs && call.batch < 2 * threads) {  // too few images to keep the threads busy: they share each
      const int64_t keys = call.batch * arguments.keys_stride;
      arguments.keys = shared.take<float>(0, keys + call.batch * arguments.labels_stride);
      arguments.labels = reinterpret_cast<uint32_t*>(arguments.keys + keys);
      start(DETPOST_BEST(make_shared_part), arguments, call.batch * arguments.parts, threads);
    }
    start(DETPOST_BEST(decode_image), arguments, call.batch, numbers < 1 << 16 ? 1 : threads);
  });
}
