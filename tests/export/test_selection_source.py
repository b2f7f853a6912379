"""The decode as one C++ file: compiled with sanitizers and held to Python's, to the bit."""

import shutil
import subprocess

import numpy as np
import pytest
import torch

from detpost import DecodeSpec, DetectionPostProcessor
from detpost.export.selection_source import SOURCE_FILES, decode_source, write_decode_source

COMPILER, C_COMPILER = shutil.which("g++"), shutil.which("gcc")
needs_compiler = pytest.mark.skipif(not (COMPILER and C_COMPILER), reason="needs GCC")
STRICT = ["-Wall", "-Wextra", "-Werror"]
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1"]
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# In C: the header is one for both languages. Each case is a line of numbers and then its tensors, as bytes.
MAIN = r"""
#include <stdio.h>
#include <stdlib.h>
#include "detpost_decode.h"

static void* block(size_t size) { return malloc(size ? size : 1); }

int main(void) {
  const detpost_spec mine = DETPOST_SPEC;
  long long n[14];
  double threshold;
  if (mine.top_k < 1) return 9;
  while (scanf("%lld %lld %lld %lld %lld %lld %lld %lld %lld %lld %lld %lf", n, n + 1, n + 2, n + 3, n + 4, n + 5,
               n + 6, n + 7, n + 8, n + 9, n + 10, &threshold) == 12) {
    const detpost_spec spec = {(int32_t)n[0], (int32_t)n[1], n[2], n[3], (int32_t)n[4], (int32_t)n[5], (int32_t)n[6],
                               (float)threshold};
    const long long batch = n[7], queries = n[8], classes = n[9], dtype = n[10];
    const size_t elements = (size_t)(batch * queries * classes), width = dtype ? 2 : 4;
    const size_t kept = (size_t)(batch * detpost_kept(&spec, queries, classes));
    void* logits = block(elements * width);
    float* boxes = block((size_t)(batch * queries) * 16);
    int64_t* sizes = block((size_t)batch * 16);
    int64_t *labels = block(kept * 8), *chosen = block(kept * 8);
    float *out_boxes = block(kept * 16), *scores = block(kept * 4);
    uint8_t* valid = block(kept);
    if (getchar() != '\n' || fread(logits, width, elements, stdin) != elements) return 8;
    if (fread(boxes, 16, (size_t)(batch * queries), stdin) != (size_t)(batch * queries)) return 7;
    if (fread(sizes, 16, (size_t)batch, stdin) != (size_t)batch) return 6;
    const int outcome = detpost_decode(&spec, logits, (int)dtype, boxes, sizes[0] < 0 ? NULL : sizes, batch, queries,
                                       classes, labels, out_boxes, scores, valid, chosen);
    if (outcome != DETPOST_DONE) return 5;
    fwrite(labels, 8, kept, stdout);
    fwrite(out_boxes, 16, kept, stdout);
    fwrite(scores, 4, kept, stdout);
    fwrite(valid, 1, kept, stdout);
    fwrite(chosen, 8, kept, stdout);
    free(logits), free(boxes), free(sizes), free(labels), free(chosen), free(out_boxes), free(scores), free(valid);
  }
  const detpost_spec wrong = {0, 0, 0, -1, 0, 0, 0, 0.0f};
  if (detpost_kept(&wrong, 3, 3) != 0 || detpost_kept(NULL, 3, 3) != 0) return 4;
  const int outcome = detpost_decode(&mine, NULL, 0, NULL, NULL, 1, 3, 3, NULL, NULL, NULL, NULL, NULL);
  return outcome == DETPOST_BAD_ARGUMENTS ? 0 : 3;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The program, with every warning an error and every sanitizer on."""
    folder = tmp_path_factory.mktemp("decode")
    write_decode_source(folder, DecodeSpec.preset("rtdetr", score_threshold=0.25))
    (folder / "main.c").write_text(MAIN)
    commands = (
        [C_COMPILER, "-std=c99", "-pedantic", *STRICT, *SANITIZED, "-c", "main.c"],
        [COMPILER, "-std=c++17", "-O1", "-ffp-contract=off", *STRICT, *SANITIZED, "-c", "detpost_decode.cpp"],
        [COMPILER, *SANITIZED, "main.o", "detpost_decode.o", "-o", "decode"],
    )
    for command in commands:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder / "decode"


def cases(count, seed):
    """Make specs and raw outputs at random: ties, NaN, infinities, half precision, every choice of a spec."""
    random = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        batch, queries, classes = (int(random.integers(1, most)) for most in (4, 90, 24))
        spec = DecodeSpec(
            activation=str(random.choice(["sigmoid", "softmax"])),
            selection=str(random.choice(["flat", "per_query"])),
            top_k=int(random.choice([1, 7, 100, 300])),
            background=str(random.choice(["none", "first", "last"])) if classes > 1 else "none",
            box_format=str(random.choice(["cxcywh", "xyxy", "xywh"])),
            clip=bool(random.integers(2)),
            score_threshold=[None, 0.0, 0.3][random.integers(3)],
        )
        logits = torch.randn(batch, queries, classes, generator=generator) * float(random.choice([0.5, 4, 40]))
        if random.integers(2):
            logits = (logits * 2).round() / 2
        odd = torch.rand(logits.shape, generator=generator)
        if random.integers(2):
            for low, value in ((0.0, torch.nan), (0.05, torch.inf), (0.08, -torch.inf), (0.15, 0.0), (0.2, -0.0)):
                logits = torch.where((odd >= low) & (odd < low + 0.03), value, logits)
        dtype = list(DTYPES)[random.integers(3)]
        boxes = torch.rand(batch, queries, 4, generator=generator) * 1.4 - 0.2
        sizes = torch.randint(1, 3000, (batch, 2), generator=generator) if random.integers(4) else None
        yield spec, logits.to(dtype), boxes, sizes


def as_bytes(spec, logits, boxes, sizes):
    background = {"none": -1, "first": 0, "last": -2}[spec.background]
    numbers = [
        int(spec.activation == "softmax"), int(spec.selection == "per_query"), spec.top_k, background,
        ("cxcywh", "xyxy", "xywh").index(spec.box_format), int(spec.clip), int(spec.score_threshold is not None),
        *logits.shape, DTYPES[logits.dtype],
    ]  # fmt: skip
    head = f"{' '.join(map(str, numbers))} {spec.score_threshold or 0.0}\n".encode()
    given = torch.full((len(logits), 2), -1) if sizes is None else sizes
    raw = logits.view(torch.int16) if logits.dtype != torch.float32 else logits
    return head + raw.numpy().tobytes() + boxes.numpy().tobytes() + given.numpy().tobytes()


@needs_compiler
@pytest.mark.parametrize("seed", range(3))
def test_it_gives_pythons_detections_to_the_bit(program, seed):
    made = list(cases(120, seed))
    done = subprocess.run([program], input=b"".join(as_bytes(*case) for case in made), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[:2000]
    rest = done.stdout
    for place, (spec, logits, boxes, sizes) in enumerate(made):
        with torch.no_grad():
            found = DetectionPostProcessor(spec)(logits, boxes, sizes)
        for name in ("labels", "boxes", "scores", "valid", "queries"):
            expected = getattr(found, name).numpy().tobytes()
            assert rest[: len(expected)] == expected, (place, name, spec, logits.dtype, tuple(logits.shape))
            rest = rest[len(expected) :]
    assert rest == b""


@needs_compiler
def test_what_is_planted_in_it_is_found(program, tmp_path):
    made = list(cases(40, 0))
    said = b"".join(as_bytes(*case) for case in made)
    folder = program.parent
    text = (folder / "detpost_decode.cpp").read_text()
    planted = text.replace("value = value == 0.0f ? 0.0f : value;", "", 1)  # -0.0 is below 0.0 then
    assert planted != text
    for name in ("detpost_decode.h", "main.o"):
        shutil.copyfile(folder / name, tmp_path / name)
    (tmp_path / "wrong.cpp").write_text(planted)
    build = [COMPILER, "-std=c++17", "-O1", "-ffp-contract=off", *SANITIZED, "wrong.cpp", "main.o", "-o", "wrong"]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    right, wrong = (subprocess.run([each], input=said, capture_output=True) for each in (program, tmp_path / "wrong"))
    assert right.stdout != wrong.stdout


@needs_compiler
@pytest.mark.skipif(not shutil.which("cmake"), reason="needs CMake")
def test_it_is_a_cmake_target(tmp_path):
    write_decode_source(tmp_path / "decode", DecodeSpec.preset("detr"))
    (tmp_path / "main.c").write_text(MAIN)
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.16)\nproject(mine C CXX)\nadd_subdirectory(decode)\n"
        "add_executable(mine main.c)\ntarget_link_libraries(mine detpost_decode)\n"
    )
    for command in (["cmake", "-S", ".", "-B", "build"], ["cmake", "--build", "build"]):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert subprocess.run([tmp_path / "build" / "mine"], stdin=subprocess.DEVNULL).returncode == 0


def test_it_includes_the_standard_library_alone():
    included = [line.split()[1] for line in decode_source().splitlines() if line.startswith("#include")]
    assert "<immintrin.h>" in included  # guarded: DETPOST_PORTABLE leaves it out
    assert [name for name in included if name.startswith('"')] == ['"detpost_decode.h"']


def test_the_header_says_how_this_network_is_decoded(tmp_path):
    files = write_decode_source(tmp_path, DecodeSpec.preset("detr", top_k=50, score_threshold=1))
    assert [path.name for path in files] == list(SOURCE_FILES)
    assert "#define DETPOST_SPEC {1, 1, 50, -2, 0, 0, 1, 1.0f}" in files[0].read_text()
