from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from detpost import DecodeSpec, DetectionPostProcessor, Detections
from detpost.kernels.triton import decode as triton_decode
from detpost.kernels.triton import select as triton_select
from detpost.kernels.triton.decode import decode, takes
from detpost.kernels.triton.select import block_sizes
from detpost.reference.softmax import limbs
from tests.kernels.triton.harness import (
    INTERPRETED,
    _plain_references,  # noqa: F401
    assert_compiles,
    assert_passes_interpreted,
    assert_plain,
    compiled_whole,
    in_the_ordinary_process,
    on_each_device,
    replayed,
    written_arguments,
)

NAN, INF = math.nan, math.inf
# Every value of every field, and all the pairs of activation, selection and background.
SPECS = [
    DecodeSpec(activation, selection, 5, threshold, background, box_format, clip)
    for (activation, selection, background), threshold, box_format, clip in zip(
        [(a, s, b) for a in ("sigmoid", "softmax") for s in ("flat", "per_query") for b in ("none", "first", "last")],
        [None, 0.4, 0.0, 1.0] * 3,
        ["cxcywh", "xyxy", "xywh"] * 4,
        [True, False, True, True, False] * 3,
        strict=False,
    )
]


def raw(queries=7, classes=4, dtype=torch.float32, batch=2):
    """Logits with ties, NaN and infinities, boxes that leave the image, and sizes that differ."""
    logits = torch.randn(batch, queries, classes).mul(2).round().div(2)
    wild = torch.tensor([NAN, INF, -INF, -0.0, 30.0, -100.0])[torch.randint(6, logits.shape)]
    logits = torch.where(torch.rand(logits.shape) < 0.2, wild, logits)
    sizes = torch.randint(10, 1000, (batch, 2))
    return logits.to(dtype), (torch.rand(batch, queries, 4) * 1.2 - 0.1).to(dtype), sizes


def hold(logits, boxes, sizes, spec, device):
    moved = [None if value is None else value.to(device) for value in (logits, boxes, sizes)]
    assert takes(*moved, spec)
    actual = decode(*moved, spec)
    expected = DetectionPostProcessor(spec)(logits, boxes, sizes)
    assert isinstance(actual, Detections)
    for name, ours, plain in zip(Detections._fields, actual, expected, strict=True):
        assert ours.dtype == plain.dtype
        if name == "scores" and spec.activation == "sigmoid":  # two libraries' exp may differ in float64's last bit
            torch.testing.assert_close(ours.cpu(), plain, rtol=2e-7, atol=0)
        else:
            assert torch.equal(ours.cpu(), plain), (spec, name, ours, plain)


@on_each_device
@pytest.mark.parametrize("spec", [DecodeSpec(top_k=3), DecodeSpec("softmax", "per_query", 3)], ids=repr)
def test_the_reference_is_no_kernel(spec, device):
    logits, boxes, sizes = raw()
    assert_plain(DetectionPostProcessor(spec), logits.to(device), boxes.to(device), sizes.to(device))


@in_the_ordinary_process
@pytest.mark.slow
def test_everything_under_the_interpreter():
    assert_passes_interpreted(__file__, at_least=16)


@on_each_device
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.activation}-{spec.selection}-{spec.background}")
def test_every_spec_gives_the_plain_detections(spec, device):
    for _ in range(1 if INTERPRETED else 50):
        logits, boxes, sizes = raw()
        hold(logits, boxes, sizes, spec, device)
        hold(logits, boxes, None, spec, device)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_compared_as_it_is(dtype, device):
    logits, boxes, sizes = raw(dtype=dtype, queries=9)
    hold(logits, boxes, sizes.float(), DecodeSpec(top_k=6, clip=True), device)
    hold(logits, boxes, sizes.half(), DecodeSpec("softmax", "per_query", 6, background="last"), device)


@on_each_device
def test_more_kept_than_there_are_and_batches_of_one(device):
    logits, boxes, sizes = raw(queries=3, classes=2, batch=1)
    hold(logits, boxes, sizes, DecodeSpec(top_k=300), device)
    hold(logits, boxes, sizes, DecodeSpec(top_k=300, selection="per_query"), device)
    hold(logits[..., :1], boxes, sizes, DecodeSpec("softmax", background="last", top_k=2), device)


@on_each_device
@pytest.mark.parametrize("classes", [1, 92, 256, 300, 1204, 5000])  # one to four limbs
def test_softmax_scores_are_the_reference_to_the_bit(classes, device):
    ordinary = torch.randn(3, classes) * torch.tensor([[0.3], [3.0], [30.0]])
    peaked = torch.where(torch.arange(classes) == classes // 2, 0.0, -torch.tensor([[3.0], [12.0], [15.9], [40.0]]))
    wild, _, _ = raw(4, classes, batch=1)
    logits = torch.cat((ordinary, peaked, peaked + 70_000.3, wild[0]))[None]
    boxes = torch.rand(1, logits.shape[1], 4)
    assert limbs(classes)[1] == {1: 1, 92: 2, 256: 2, 300: 3, 1204: 3, 5000: 4}[classes]
    hold(logits, boxes, None, DecodeSpec("softmax", "per_query", 300), device)
    hold(logits, boxes, None, DecodeSpec("softmax", "flat", 300), device)


@on_each_device
def test_a_long_row_shared_by_programs_decodes_alike(device, monkeypatch):
    monkeypatch.setattr(triton_select, "_SEGMENT", 60)
    logits, boxes, sizes = raw(queries=41, classes=5, batch=1)
    for spec in (DecodeSpec(top_k=9, background="first"), DecodeSpec("softmax", background="last", top_k=9)):
        hold(logits, boxes, sizes, spec, device)


@on_each_device
def test_equal_logits_score_alike(device):
    logits = torch.full((1, 4, 9), -4.9)
    scores = decode(logits.to(device), torch.rand(1, 4, 4, device=device), None, DecodeSpec(top_k=30)).scores
    assert len(scores.unique()) == 1


@on_each_device
def test_compiles_whole(device):
    logits, boxes, sizes = (value.to(device) for value in raw())
    spec = DecodeSpec(top_k=5, clip=True)
    actual = compiled_whole(lambda *raw: decode(*raw, spec))(logits * 1, boxes, sizes)
    for ours, plain in zip(actual, decode(logits, boxes, sizes, spec), strict=True):
        assert torch.equal(ours, plain)


@on_each_device
def test_what_is_not_taken_is_said(device):
    logits, boxes = torch.zeros(2, 9, 4, device=device), torch.zeros(2, 9, 4, device=device)
    assert takes(logits, boxes, None, DecodeSpec())
    assert not takes(logits.double(), boxes, None, DecodeSpec())
    assert not takes(logits, boxes.double(), None, DecodeSpec())
    assert not takes(logits[:0], boxes[:0], None, DecodeSpec())
    assert not takes(logits[:, :0], boxes[:, :0], None, DecodeSpec())
    assert not takes(logits.to("meta"), boxes.to("meta"), None, DecodeSpec())
    wide = torch.zeros(1, 1, 9000, device=device)
    assert takes(wide, boxes[:1, :1], None, DecodeSpec())
    assert not takes(wide, boxes[:1, :1], None, DecodeSpec(top_k=1025))
    assert not takes(wide, boxes[:1, :1], None, DecodeSpec(selection="per_query"))
    assert not takes(wide, boxes[:1, :1], None, DecodeSpec("softmax"))


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [DecodeSpec(), DecodeSpec.preset("rfdetr"), DecodeSpec.preset("detr")], ids=repr)
def test_replays_from_a_cuda_graph(spec):
    logits, boxes, sizes = (value.cuda() for value in raw(300, 80, batch=4))
    expected = decode(logits, boxes, sizes, spec)
    for ours, plain in zip(replayed(lambda *raw: decode(*raw, spec), logits, boxes, sizes), expected, strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "classes"), [(1, 1203), (8, 1203), (32, 80)])
def test_real_sizes_on_a_gpu(batch, classes):
    logits, boxes, sizes = raw(300, classes, batch=batch)
    for spec in (DecodeSpec(), DecodeSpec(selection="per_query"), DecodeSpec.preset("detr", selection="flat")):
        hold(logits, boxes, sizes, spec, "cuda")


@in_the_ordinary_process
def test_one_launch_which_a_compiler_sees_leave_its_inputs_alone(monkeypatch):
    inputs = [torch.empty(shape, device="meta") for shape in ((2, 300, 80), (2, 300, 4), (2, 2))]
    written = ["corners_ptr", "out_labels_ptr", "out_queries_ptr", "scores_ptr", "scratch_ptr", "valid_ptr"]
    for spec, launches in (
        (DecodeSpec(), [written]),
        (DecodeSpec.preset("detr"), [["keys_ptr", "labels_ptr"], written]),
    ):
        assert written_arguments(lambda *raw, spec=spec: decode(*raw, spec), inputs, monkeypatch) == launches


@in_the_ordinary_process
@pytest.mark.parametrize(
    ("logits", "preselected", "has_sizes", "softmax", "per_query", "box_format", "clip"),
    [("fp32", 0, 1, 0, 0, 2, 1), ("fp16", 0, 0, 0, 0, 0, 1), ("fp32", 0, 1, 1, 1, 1, 0), ("i32", 1, 1, 0, 0, 2, 0)],
)
def test_the_decode_compiles_for_a_gpu(
    logits, preselected, has_sizes, softmax, per_query, box_format, clip, tmp_path, monkeypatch
):
    groups, capacity = block_sizes(20)
    pointers = [logits, "i32", "i32", "bf16", "i64", "i64", "fp32", "i64", "fp32", "i64", "i1"]
    constants = {
        "PRESELECTED": bool(preselected),
        "HAS_SIZES": bool(has_sizes),
        "SOFTMAX": bool(softmax),
        "PER_QUERY": bool(per_query),
        "FORMAT": box_format,
        "CLIP": bool(clip),
        "GROUPS": groups,
        "BLOCK": triton_select.BLOCK,
        "CAPACITY": capacity,
    }
    types = [*(f"*{name}" for name in pointers), *["i32"] * 5, "fp32"]
    assert_compiles(triton_decode._decode_kernel, types, constants, triton_select.WARPS, tmp_path, monkeypatch)


@in_the_ordinary_process
@pytest.mark.parametrize(("softmax", "per_query", "width"), [(0, 1, 128), (1, 0, 128), (1, 1, 8192)])
def test_the_keys_of_queries_compile_for_a_gpu(softmax, per_query, width, tmp_path, monkeypatch):
    types = ["*bf16", "*fp32", "*i32", "i32", "i32", "i32"]
    constants = {
        "SOFTMAX": bool(softmax),
        "PER_QUERY": bool(per_query),
        "QUERIES": max(1, 2048 // width),
        "CLASSES": width,
        "BITS": limbs(width)[0],
        "LIMBS": limbs(width)[1],
    }
    assert_compiles(triton_decode._query_kernel, types, constants, max(4, width // 512), tmp_path, monkeypatch)
