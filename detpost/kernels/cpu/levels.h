// Compiles the kernels of the file DETPOST_FAMILY once for each instruction set, in a namespace of its own. A file that
// holds its own kernels names itself, and guards by DETPOST_KERNELS what is compiled so. DETPOST_BEST(name) is the one to
// run.
//
// Inside the kernels no template of the standard library is used: its instantiations are shared between the three, and the
// linker might keep one that the processor cannot run.

#include "common.h"

#define DETPOST_KERNELS
#define DETPOST_FMA 0
#define DETPOST_REGISTER 16  // bytes
namespace {
namespace baseline {
#include DETPOST_FAMILY
}
}  // namespace
#undef DETPOST_FMA
#undef DETPOST_REGISTER

#if defined(DETPOST_HAS_V3)
#define DETPOST_FMA 1
#define DETPOST_REGISTER 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace {
namespace v3 {
#include DETPOST_FAMILY
}
}  // namespace
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef DETPOST_REGISTER

#define DETPOST_REGISTER 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
namespace {
namespace v4 {
#include DETPOST_FAMILY
}
}  // namespace
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef DETPOST_REGISTER
#undef DETPOST_FMA
#endif

#if defined(DETPOST_HAS_V3)
#define DETPOST_BEST(name) detpost::at_level(baseline::name, v3::name, v4::name)
#else
#define DETPOST_BEST(name) baseline::name
#endif
