// Masks to COCO's compressed run lengths.

#include <cstdint>
#include <cstring>

#include "common.h"

using namespace detpost;

namespace {

thread_local Scratch scratch;

// Writes a number as COCO does: 5 bits a character, lowest first, a sixth says that more follow. Gives how many.
int64_t write_number(int64_t number, char* out) {
  int64_t count = 0;
  for (bool more = true; more; ++count) {
    const int64_t bits = number & 0x1F;
    number >>= 5;  // the sign is kept
    more = bits & 0x10 ? number != -1 : number != 0;
    out[count] = static_cast<char>((more ? bits | 0x20 : bits) + 48);
  }
  return count;
}

}  // namespace

#define DETPOST_FAMILY "run_lengths.h"
#include "levels.h"

// One mask (height, width), of bytes. Writes to `out` if it has room, and to `length` how many characters there are; or,
// where `room` is too small, how many there may be at the most.
DETPOST_EXPORT int detpost_run_lengths(const uint8_t* mask, int64_t height, int64_t width, char* out, int64_t room,
                                       int64_t* length) {
  return outcome_of([&] {
    const int64_t changes = DETPOST_BEST(find_changes)(mask, height, width);
    constexpr int64_t kMost = 8;  // characters of a number below 2^32, and its sign
    *length = kMost * (changes + 2);
    if (*length > room) return;
    const int64_t* at = scratch.take<int64_t>(1, changes);
    int64_t runs[3] = {0, 0, 0}, count = 0, written = 0, before = 0;
    const auto add = [&](int64_t run) {  // from the fourth on as differences to the last but one
      written += write_number(count > 2 ? run - runs[(count - 2) % 3] : run, out + written);
      runs[count++ % 3] = run;
    };
    if (height * width > 0 && mask[0]) add(0);
    for (int64_t i = 0; i < changes; ++i) add(at[i] - before), before = at[i];
    add(height * width - before);
    *length = written;
  });
}
