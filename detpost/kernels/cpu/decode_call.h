// A call of the decode: what decode.cpp is told, by ctypes and by ../../_tensors.cpp.

#ifndef DETPOST_DECODE_CALL_H
#define DETPOST_DECODE_CALL_H

#include <cstdint>

enum Activation : int { kSigmoid = 0, kSoftmax = 1, kScores = 2 };  // kScores: they are scores already
enum Selection : int { kFlat = 0, kPerQuery = 1 };
enum SizeType : int { kNoSizes = 0, kSizesFloat32 = 1, kSizesInt32 = 2, kSizesInt64 = 3 };
// kSidesNotNegative: kCxcywh, of whose sides none is below 0. Boxes come out as kXyxy or kXywh; the latter of kCxcywh alone.
enum BoxFormat : int { kCxcywh = 0, kXyxy = 1, kXywh = 2, kSidesNotNegative = 3 };

// All its arguments in one record of 8-byte numbers, addresses among them: ctypes spends longer on twenty arguments than
// the decode of an image does on selecting. The strides are from query to query, in elements; of logits they are the classes
// unless they are float32, each query is kept for its best class, and nothing but that is asked.
struct DecodeCall {
  int64_t logits, logits_stride, dtype, activation, selection, batch, queries, classes, kept, background;
  int64_t boxes, boxes_stride, sizes, size_type, box_format, clip, out_format;
  int64_t out_scores, out_labels, out_boxes, out_queries, out_valid, threads, has_threshold;
  double threshold;
};

#endif
