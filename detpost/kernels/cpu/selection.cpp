// The k best of each row of scores.

#include <cstdint>
#include <cstring>

#include "common.h"

using namespace detpost;

namespace {

thread_local Scratch scratch;

struct SelectArguments {
  const void* scores;  // (batch, width), contiguous
  int dtype;
  int64_t width, kept;
  int64_t* indices;  // (batch, kept)
};

}  // namespace

#define DETPOST_FAMILY "selection.h"
#include "levels.h"

DETPOST_EXPORT int detpost_select(const void* scores, int dtype, int64_t batch, int64_t width, int64_t kept,
                                  int64_t* indices, int threads) {
  return outcome_of([&] {
    const SelectArguments arguments{scores, dtype, width, kept, indices};
    start(DETPOST_BEST(select_row), arguments, batch, batch * width < (1 << 16) ? 1 : threads);
  });
}
