"""The derivative of a decode straight back: what autograd finds in the reference form, once and twice."""

import math
import random

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from detpost import DecodeSpec, DetectionPostProcessor
from detpost.kernels.aten import gradient
from detpost.kernels.cpu import decode_back, library
from detpost.reference.decode import decode as reference_decode

SPECS = {
    "flat": DecodeSpec(top_k=12),
    "more than there are": DecodeSpec(top_k=1000),
    "threshold": DecodeSpec(top_k=20, score_threshold=0.6),
    "nothing above": DecodeSpec(top_k=5, score_threshold=0.999999),
    "per query": DecodeSpec(top_k=7, selection="per_query"),
    "background": DecodeSpec(top_k=15, background="last"),
    "xyxy": DecodeSpec(top_k=9, box_format="xyxy"),
    "xywh": DecodeSpec(top_k=9, box_format="xywh"),
}
SIZES = {"none": None, "whole": torch.tensor([[30, 50], [70, 20]]), "float": torch.tensor([[3.5, 0.25], [7.0, 1e3]])}


def leaves(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    logits, boxes = torch.randn(2, 11, 6) * 2, torch.rand(2, 11, 4)
    logits = torch.where(torch.rand(logits.shape) < 0.05, math.nan, logits)
    return logits.to(dtype).requires_grad_(), boxes.to(dtype).requires_grad_()


def first_and_second(decode, seed, sizes, spec, dtype):
    """Gradients of a weighted sum of the outputs, and of the length of these gradients; the second is not linear."""
    logits, boxes = leaves(seed, dtype)
    found = decode(logits, boxes, sizes, spec)
    torch.manual_seed(seed + 1)
    weights = torch.randn(found.scores.shape), torch.randn(found.boxes.shape)
    total = (found.scores.square() * weights[0]).sum() + ((found.boxes / 1000).square() * weights[1]).sum()
    first = torch.autograd.grad(total, (logits, boxes), create_graph=True)
    second = torch.autograd.grad(sum(value.nan_to_num().square().sum() for value in first), (logits, boxes))
    once = torch.autograd.grad(
        [*decode(logits, boxes, sizes, spec)[0:3:2]], (logits, boxes), [weights[0], weights[1].to(found.boxes.dtype)]
    )
    return found, once, first, second


@pytest.fixture(autouse=True)
def _as_by_default(request, monkeypatch):
    monkeypatch.delenv("DETPOST_KERNEL", raising=False)
    if "native" in request.node.name and library.missing() is not None:
        pytest.skip(f"the C++ kernels are {library.missing()}")


def by_dispatch(logits: Tensor, boxes: Tensor, sizes: Tensor | None, spec: DecodeSpec):
    found = DetectionPostProcessor(spec)(logits, boxes, sizes)
    assert (found.scores if logits.requires_grad else found.boxes).grad_fn.name() == "_DecodeWithGradientBackward"
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("spec", SPECS)
def test_as_the_reference_form_once_and_twice(spec, sizes, dtype, monkeypatch):
    for kernel in ("native", "numpy") if library.missing() is None else ("numpy",):
        monkeypatch.setenv("DETPOST_KERNEL", kernel)
        for seed in range(3):
            given = seed, SIZES[sizes], SPECS[spec], dtype
            mine, theirs = first_and_second(by_dispatch, *given), first_and_second(reference_decode, *given)
            for got, want in zip(mine[0], theirs[0], strict=True):
                assert torch.equal(got, want)
            tolerance = 1e-5 if dtype == torch.float32 else 1e-2
            for got, want in zip(mine[1:], theirs[1:], strict=True):
                for value, other in zip(got, want, strict=True):
                    assert value.dtype == dtype
                    assert value.isfinite().all()
                    unit = max(float(other.detach().abs().max()), 1.0)  # of sums whose parts cancel out
                    torch.testing.assert_close(value / unit, other / unit, rtol=tolerance, atol=tolerance)


def test_where_few_are_kept_every_gradient_reaches_its_own_place():
    logits, boxes = torch.zeros(1, 3, 2, requires_grad=True), torch.rand(1, 3, 4, requires_grad=True)
    found = by_dispatch(logits, boxes, torch.tensor([[10, 100]]), DecodeSpec(top_k=2))
    found.scores.backward(torch.tensor([[1.0, 2.0]]), retain_graph=True)
    assert logits.grad.tolist() == [[[0.25, 0.5], [0, 0], [0, 0]]]  # both of the first query
    assert boxes.grad is None
    found.boxes.backward(torch.tensor([[[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 1.0, 0.0]]]))
    assert boxes.grad.tolist() == [[[500.0, 60.0, 150.0, 10.0], [0] * 4, [0] * 4]]


@pytest.mark.parametrize("kernel", ["native", "numpy"])
@pytest.mark.parametrize("needed", ["logits", "boxes"])
def test_only_what_is_asked_for_is_computed(needed, kernel, monkeypatch):
    monkeypatch.setenv("DETPOST_KERNEL", kernel)
    other = {"logits": "_back_to_boxes", "boxes": "_back_to_logits"}[needed]
    monkeypatch.setattr(gradient, other, lambda *_: pytest.fail("nobody asked"))
    given = []
    plain = decode_back._run
    monkeypatch.setattr(decode_back, "_run", lambda: lambda *args: given.append(args[4:6]) or plain()(*args))
    logits, boxes = (
        value.detach().requires_grad_(name == needed)
        for name, value in zip(("logits", "boxes"), leaves(0), strict=True)
    )
    found = by_dispatch(logits, boxes, None, DecodeSpec(top_k=5))
    (found.scores.sum() + found.boxes.sum()).backward()
    assert [logits.grad is not None, boxes.grad is not None] == [needed == "logits", needed == "boxes"]
    if kernel == "native":
        assert [grad is not None for grad in given[0]] == [needed == "logits", needed == "boxes"]


@pytest.mark.parametrize("kernel", ["native", "numpy"])
@pytest.mark.parametrize("needed", ["logits", "boxes"])
def test_of_one_input_the_outputs_of_the_other_have_no_gradient_and_a_second_one_is_found(needed, kernel, monkeypatch):
    monkeypatch.setenv("DETPOST_KERNEL", kernel)
    found = []
    for decode in (by_dispatch, reference_decode):
        logits, boxes = (
            value.detach().nan_to_num().requires_grad_(name == needed)
            for name, value in zip(("logits", "boxes"), leaves(0), strict=True)
        )
        kept = decode(logits, boxes, torch.tensor([[30, 50], [70, 20]]), DecodeSpec(top_k=5))
        assert [kept.scores.requires_grad, kept.boxes.requires_grad] == [needed == "logits", needed == "boxes"]
        leaf = logits if needed == "logits" else boxes
        (once,) = torch.autograd.grad(
            kept.scores.square().sum() + (kept.boxes / 10).square().sum(), leaf, create_graph=True
        )
        found.append((once, *torch.autograd.grad(once.square().sum(), leaf)))
    for value, other in zip(*found, strict=True):
        assert other.any()
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["native", "numpy"])
def test_gradients_may_be_views(kernel, monkeypatch):
    monkeypatch.setenv("DETPOST_KERNEL", kernel)
    wide, boxes, mixed = torch.randn(2, 11, 12), torch.rand(2, 11, 4), torch.rand(5, 3)
    found = []
    for decode in (by_dispatch, reference_decode):
        leaves_here = wide.clone().requires_grad_(), boxes.clone().requires_grad_()
        kept = decode(leaves_here[0][..., ::2], leaves_here[1], None, DecodeSpec(top_k=5))
        # The gradient of a sum is expanded from one number, that of a transposed product is a view likewise.
        (kept.scores.sum() + kept.boxes.transpose(1, 2).matmul(mixed).sum()).backward()
        found.append([leaf.grad for leaf in leaves_here])
    for value, other in zip(*found, strict=True):
        assert other.any()
        torch.testing.assert_close(value, other)


def test_of_no_images_and_no_queries():
    for shape in [(0, 5), (2, 0)]:
        logits, boxes = torch.zeros(*shape, 3, requires_grad=True), torch.zeros(*shape, 4, requires_grad=True)
        found = DetectionPostProcessor(DecodeSpec(top_k=4))(logits, boxes)
        (found.scores.sum() + found.boxes.sum()).backward()
        assert logits.grad.shape == logits.shape
        assert boxes.grad.shape == boxes.shape


@pytest.mark.parametrize(
    "spec", [DecodeSpec(clip=True), DecodeSpec(activation="softmax"), DecodeSpec(activation="softmax", clip=True)]
)
def test_other_heads_find_their_derivative_operator_by_operator(spec):
    logits, boxes = leaves(0)
    assert not gradient.takes(logits, boxes, None, spec)
    assert DetectionPostProcessor(spec)(logits, boxes).scores.grad_fn.name() != "_DecodeWithGradientBackward"


def test_other_ways_of_differentiating_look_into_the_decode(monkeypatch):
    spec = DecodeSpec(top_k=4)
    logits, boxes = (value.detach().nan_to_num() for value in leaves(0))
    assert gradient.takes(logits, boxes, SIZES["float"], spec)
    assert not gradient.takes(logits, boxes.double(), None, spec)
    assert not gradient.takes(logits, boxes, SIZES["float"].clone().requires_grad_(), spec)

    def total(values):
        return DetectionPostProcessor(spec)(values, boxes).scores.sum()

    leaf = logits.clone().requires_grad_()
    total(leaf).backward()
    direction = torch.randn(logits.shape)
    monkeypatch.setattr(gradient, "_DecodeWithGradient", None)  # nothing can go that way
    torch.testing.assert_close(torch.func.grad(total)(logits), leaf.grad)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(total(forward_ad.make_dual(logits, direction))).tangent
    torch.testing.assert_close(tangent, (leaf.grad * direction).sum())


def test_random_shapes():
    chance = random.Random(0)
    for seed in range(60):
        torch.manual_seed(seed)
        shape = chance.choice([1, 2, 3]), chance.choice([1, 2, 40]), chance.choice([1, 3, 30])
        spec = DecodeSpec(top_k=chance.choice([1, 10, 300]), selection=chance.choice(["flat", "per_query"]))
        logits, boxes = torch.randn(shape).round().requires_grad_(), torch.rand(*shape[:2], 4).requires_grad_()
        weights = torch.randn(4)
        grads = []
        for decode in (by_dispatch, reference_decode):
            found = decode(logits, boxes, None, spec)
            grads.append(torch.autograd.grad(found.scores.sum() + (found.boxes * weights).sum(), (logits, boxes)))
        for value, other in zip(*grads, strict=True):
            torch.testing.assert_close(value, other)
