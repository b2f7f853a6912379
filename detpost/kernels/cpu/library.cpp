// What the library says of itself: the number of its interface, and the processor's instructions that it uses.
//
// A plain C interface, reached through ctypes (library.py): no Python or PyTorch headers, so one build serves every
// version of both. A family of operators is a file of its own: its interface in NAME.cpp and its kernels in NAME.h, which
// levels.h compiles three times on x86-64, for the baseline, for AVX2 with FMA and for AVX-512, and the processor that runs
// them decides; elsewhere once, for the architecture's baseline (NEON on arm64).

#include <cstdlib>
#include <cstring>

#include "common.h"

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

// Raised with every change of a signature in any family: library.py refuses another number.
DETPOST_EXPORT int detpost_interface() { return 13; }

DETPOST_EXPORT int detpost_level() { return detpost::level(); }
