// The k best of each row of scores.
// Included by selection.cpp in the namespace of each instruction set.

#include "arithmetic.h"
#include "best_of_row.h"

static void select_row(const void* data, int64_t row) {
  const SelectArguments& of = *static_cast<const SelectArguments*>(data);
  uint32_t* best = scratch.take<uint32_t>(7, of.kept);
  select_best(as_floats(of.scores, of.dtype, row * of.width, of.width), of.width, of.kept, best);
  int64_t* out = of.indices + row * of.kept;
  for (int64_t i = 0; i < of.kept; ++i) out[i] = best[i];
}
