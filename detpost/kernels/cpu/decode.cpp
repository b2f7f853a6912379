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
};

}  // namespace

#define DETPOST_FAMILY "decode.h"
#include "levels.h"

DETPOST_EXPORT int detpost_decode(const char* record) {
  return outcome_of([&] {
    DecodeCall call;
    std::memcpy(&call, record, sizeof call);
    const DecodeArguments arguments{reinterpret_cast<const void*>(call.logits),
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
    const bool small = call.batch * call.queries * call.classes < (1 << 16);
    start(DETPOST_BEST(decode_image), arguments, call.batch, small ? 1 : static_cast<int>(call.threads));
  });
}
