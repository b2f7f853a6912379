"""The decode as one C++ file without dependencies: the CPU kernel itself, put together from its sources.

For those who have no Python, PyTorch or ONNX where their network runs. It is the same text that ``detpost.kernels.cpu``
is compiled from, at its baseline level of instructions and on one thread.
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from detpost.export.files import replace_when_whole
from detpost.spec import BOX_FORMAT_CODES, DecodeSpec

__all__ = ["SOURCE_FILES", "decode_source", "write_decode_source"]

SOURCE_FILES = ("detpost_decode.h", "detpost_decode.cpp", "CMakeLists.txt")

_BANNER = "// Written by detpost: the decode of a DETR-family detector. C++17, GCC or Clang, no dependencies.\n"
_CUT = '#define DETPOST_FAMILY "decode.h"'  # what follows it in decode.cpp is the library's own way in
_BACKGROUND_LAST = -2

_HEADER = """\
/* The decode of a DETR-family detector: raw logits and boxes to detections. Written by detpost. */

#ifndef DETPOST_DECODE_H
#define DETPOST_DECODE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct detpost_spec {
  int32_t softmax;       /* 1: probabilities over the classes; 0: a sigmoid of each logit */
  int32_t per_query;     /* 1: the best class of each query; 0: the best pairs of query and class */
  int64_t top_k;         /* most detections of an image */
  int64_t background;    /* channel that means "no object"; -1: none, -2: the last */
  int32_t box_format;    /* 0: cx cy w h, 1: x1 y1 x2 y2, 2: x1 y1 w h */
  int32_t clip;          /* 1: boxes end at the image's border */
  int32_t has_threshold; /* 1: what does not score above the threshold is not valid */
  float threshold;
} detpost_spec;

enum { DETPOST_FLOAT32 = 0, DETPOST_FLOAT16 = 1, DETPOST_BFLOAT16 = 2 };
enum { DETPOST_DONE = 0, DETPOST_OUT_OF_MEMORY = 1, DETPOST_FAILED = 2, DETPOST_BAD_ARGUMENTS = 3 };

/* How the exported network is decoded: const detpost_spec spec = DETPOST_SPEC; */
#define DETPOST_SPEC @SPEC@

/* K, the detections of an image that there is room for; 0 where the arguments fit nothing. */
int64_t detpost_kept(const detpost_spec* spec, int64_t queries, int64_t classes);

/* Decodes a batch. Detections lie best first; equal scores by query and class ascending. A slot that is not valid reads
   label -1, query -1, score 0 and box 0 0 0 0. Any number of threads may call at once.

   logits       (batch, queries, classes) of `dtype`
   boxes        (batch, queries, 4), in units of the image
   image_sizes  (batch, 2), height and width in pixels; null leaves boxes in units of the image
   out_labels   (batch, K)
   out_boxes    (batch, K, 4), x1 y1 x2 y2
   out_scores   (batch, K)
   out_valid    (batch, K), 0 or 1
   out_queries  (batch, K)
   Gives DETPOST_DONE, or what was wrong. */
int detpost_decode(const detpost_spec* spec, const void* logits, int dtype, const float* boxes,
                   const int64_t* image_sizes, int64_t batch, int64_t queries, int64_t classes, int64_t* out_labels,
                   float* out_boxes, float* out_scores, uint8_t* out_valid, int64_t* out_queries);

#ifdef __cplusplus
}
#endif

#endif
"""

_WAY_IN = """
namespace {

int64_t background_of(const detpost_spec* spec, int64_t classes) {
  return spec->background == -2 ? classes - 1 : spec->background;
}

bool fits(const detpost_spec* spec, int64_t queries, int64_t classes) {
  if (!spec || queries < 1 || classes < 1 || spec->top_k < 1 || queries > INT32_MAX / classes) return false;
  const int64_t background = background_of(spec, classes);
  return background >= -1 && background < classes && spec->box_format >= 0 && spec->box_format <= 2;
}

}  // namespace

extern "C" int64_t detpost_kept(const detpost_spec* spec, int64_t queries, int64_t classes) {
  if (!fits(spec, queries, classes)) return 0;
  const int64_t most = spec->per_query ? queries : queries * classes;
  return spec->top_k < most ? spec->top_k : most;
}

extern "C" int detpost_decode(const detpost_spec* spec, const void* logits, int dtype, const float* boxes,
                              const int64_t* image_sizes, int64_t batch, int64_t queries, int64_t classes,
                              int64_t* out_labels, float* out_boxes, float* out_scores, uint8_t* out_valid,
                              int64_t* out_queries) {
  if (!fits(spec, queries, classes) || batch < 0 || dtype < 0 || dtype > 2 || !logits || !boxes || !out_labels ||
      !out_boxes || !out_scores || !out_valid || !out_queries) {
    return DETPOST_BAD_ARGUMENTS;
  }
  return detpost::outcome_of([&] {
    DecodeArguments arguments{logits,
                              dtype,
                              spec->softmax ? kSoftmax : kSigmoid,
                              spec->per_query ? kPerQuery : kFlat,
                              classes,
                              queries,
                              classes,
                              detpost_kept(spec, queries, classes),
                              background_of(spec, classes),
                              boxes,
                              4,
                              image_sizes,
                              image_sizes ? kSizesInt64 : kNoSizes,
                              spec->box_format,
                              spec->clip != 0,
                              kXyxy,
                              spec->has_threshold != 0,
                              spec->threshold,
                              out_scores,
                              out_labels,
                              out_boxes,
                              out_queries,
                              out_valid};
    lay_out_keys(arguments);
    for (int64_t image = 0; image < batch; ++image) baseline::decode_image(&arguments, image);
  });
}
"""

_CMAKE = """\
cmake_minimum_required(VERSION 3.16)
project(detpost_decode LANGUAGES C CXX)

add_library(detpost_decode STATIC detpost_decode.cpp)
target_include_directories(detpost_decode PUBLIC ${CMAKE_CURRENT_SOURCE_DIR})
target_compile_features(detpost_decode PUBLIC cxx_std_17)
target_compile_options(detpost_decode PRIVATE -O3 -fno-math-errno -fno-trapping-math -ffp-contract=off -Wno-psabi)
set_target_properties(detpost_decode PROPERTIES POSITION_INDEPENDENT_CODE ON)
"""


def decode_source() -> str:
    """Put the kernel's sources together.

    Returns:
        The text of one C++ file that includes ``detpost_decode.h`` and the standard library alone.

    Example:
        >>> '#include "common.h"' in decode_source()
        False
    """
    seen: set[str] = set()
    before, cut, _ = _read("decode.cpp").partition(_CUT)
    assert cut
    parts = [
        _BANNER,
        '#include "detpost_decode.h"\n',
        "#define DETPOST_PORTABLE\n#define DETPOST_KERNELS\n#define DETPOST_FMA 0\n#define DETPOST_REGISTER 16\n",
        _inlined(before, seen),
        "namespace {\nnamespace baseline {\n",
        _inlined(_read("decode.h"), seen),
        "}  // namespace baseline\n}  // namespace\n",
        _WAY_IN,
    ]
    return "\n".join(parts)


def write_decode_source(folder: str | Path, spec: DecodeSpec) -> tuple[Path, ...]:
    """Write the decode as C++: a header for C, one source file, a CMake target ``detpost_decode``.

    Args:
        folder: where to.
        spec: how the network is decoded; the header has it as ``DETPOST_SPEC``.

    Returns:
        The files, ``SOURCE_FILES``.
    """
    texts = (_HEADER.replace("@SPEC@", _spec(spec)), decode_source(), _CMAKE)
    for name, text in zip(SOURCE_FILES, texts, strict=True):
        with replace_when_whole(Path(folder) / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return tuple(Path(folder) / name for name in SOURCE_FILES)


def _spec(spec: DecodeSpec) -> str:
    """Give the initialiser of a ``detpost_spec``."""
    background = {"none": -1, "first": 0, "last": _BACKGROUND_LAST}[spec.background]
    threshold = float(spec.score_threshold or 0.0)
    values = (
        int(spec.activation == "softmax"),
        int(spec.selection == "per_query"),
        spec.top_k,
        background,
        BOX_FORMAT_CODES[spec.box_format],
        int(spec.clip),
        int(spec.score_threshold is not None),
        f"{threshold!r}f",
    )
    return f"{{{', '.join(map(str, values))}}}"


def _read(name: str) -> str:
    return files("detpost.kernels.cpu").joinpath(name).read_text(encoding="utf-8")


def _inlined(text: str, seen: set[str]) -> str:
    """Put the project's own headers in the place of their includes, each once."""

    def content(found: re.Match[str]) -> str:
        name = found[1]
        if name in seen:
            return ""
        seen.add(name)
        return _inlined(_read(name), seen)

    return re.sub(r'^#include "(\w+\.h)"\n', content, text, flags=re.MULTILINE)
