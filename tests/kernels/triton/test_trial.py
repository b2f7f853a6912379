"""The Triton kernels behind the public functions, and the trial that decides whether they serve."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from detpost import DetectionPostProcessor, kernels
from detpost.losses import hausdorff_dt_loss, hausdorff_er_loss, hausdorff_er_loss_3d
from tests.kernels.triton.harness import assert_passes_interpreted, in_the_ordinary_process, on_each_device


@in_the_ordinary_process
def test_everything_under_the_interpreter():
    assert_passes_interpreted(__file__, at_least=4)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def everything(device):
    torch.manual_seed(0)
    pred = torch.rand(2, 2, 9, 13, device=device).requires_grad_()
    volume = torch.rand(1, 2, 4, 5, 6, device=device).requires_grad_()
    target = torch.randint(2, (2, 1, 9, 13), device=device)
    found = []
    for loss in (
        hausdorff_er_loss(pred, target, k=3),
        hausdorff_er_loss(pred, target, k=2, reduction="none").square().sum(),
        hausdorff_dt_loss(pred, target.float().expand(2, 2, 9, 13), include_background=True, spacing=(1.0, 2.0)),
    ):
        found += [loss.detach(), *torch.autograd.grad(loss, pred)]
    loss = hausdorff_er_loss_3d(volume, torch.ones(1, 1, 4, 5, 6, dtype=torch.long, device=device), k=2)
    found += [loss.detach(), *torch.autograd.grad(loss, volume)]
    logits, boxes = torch.randn(2, 6, 4, device=device).mul(2).round(), torch.rand(2, 6, 4, device=device)
    for preset in ("rtdetr", "detr"):
        found += DetectionPostProcessor.from_preset(preset, top_k=5)(logits, boxes, None)
        given = logits.clone().requires_grad_()
        scores = DetectionPostProcessor.from_preset(preset, top_k=5)(given, boxes, None).scores
        found += [scores.detach(), *torch.autograd.grad(scores.sum(), given)]
    return found


@on_each_device
def test_the_public_functions_run_on_them_and_agree(device, monkeypatch):
    found = {}
    for kind in ("aten", "triton"):
        monkeypatch.setenv("DETPOST_KERNEL", kind)
        with Seen() as seen:
            found[kind] = everything(device)
        ran = {name.split(".")[1] for name in seen.names if name.startswith("detpost.triton")}
        wanted = {
            "triton_select",
            "triton_decode",
            "triton_squared_distance",
            "triton_erode",
            "triton_erosion_gradient",
        }
        assert ran == (wanted if kind == "triton" else set())
    torch.testing.assert_close(found["triton"], found["aten"], rtol=1e-5, atol=1e-6)


@on_each_device
def test_second_gradients_and_transforms_go_the_plain_way(device, monkeypatch):
    monkeypatch.setenv("DETPOST_KERNEL", "triton")
    pred = torch.rand(1, 2, 5, 6, device=device).requires_grad_()
    target = torch.randint(2, (1, 1, 5, 6), device=device)
    (first,) = torch.autograd.grad(hausdorff_er_loss(pred, target, k=2), pred, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), pred)[0].isfinite().all()
    assert torch.func.grad(lambda p: hausdorff_er_loss(p, target, k=2))(pred.detach()).isfinite().all()


@on_each_device
def test_they_stay_one_graph_under_compile(device, monkeypatch):
    monkeypatch.setenv("DETPOST_KERNEL", "triton")
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=5)
    logits, boxes = torch.randn(2, 6, 4, device=device), torch.rand(2, 6, 4, device=device)
    compiled = torch.compile(post, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(logits, boxes), post(logits, boxes), strict=True):
        assert torch.equal(got, expected)
    pred, target = torch.rand(1, 2, 5, 6, device=device), torch.randint(2, (1, 1, 5, 6), device=device)
    loss = torch.compile(hausdorff_er_loss, fullgraph=True, backend="aot_eager")
    values = []
    for run in (loss, hausdorff_er_loss):
        given = pred.clone().requires_grad_()
        value = run(given, target, k=2)
        values.append((value.detach(), *torch.autograd.grad(value, given)))
    torch.testing.assert_close(*values)


@on_each_device
def test_the_trial_passes_and_sees_a_wrong_kernel(device, monkeypatch):
    from detpost.kernels.triton import decode as triton_decode
    from detpost.kernels.triton import distance as triton_distance
    from detpost.kernels.triton import erosion as triton_erosion
    from detpost.kernels.triton import select as triton_select
    from detpost.kernels.triton import trial as triton_check

    assert triton_check.disagreement(device) is None
    right = triton_select.select
    monkeypatch.setattr(triton_select, "select", lambda scores, k: right(scores, k).flip(1))
    assert "selection" in triton_check.disagreement(device)
    monkeypatch.undo()
    decode = triton_decode.decode
    monkeypatch.setattr(triton_decode, "decode", lambda *given: decode(*given)._replace(boxes=given[1][:, :40]))
    assert "decode" in triton_check.disagreement(device)
    monkeypatch.undo()
    slope = triton_erosion.erosion_gradient
    monkeypatch.setattr(triton_erosion, "erosion_gradient", lambda *given: slope(*given) * 1.01)
    assert "erosion" in triton_check.disagreement(device)
    monkeypatch.undo()

    def fails(*_):
        raise RuntimeError("no such instruction\nand pages of it")

    monkeypatch.setattr(triton_distance, "squared_distance", fails)
    assert triton_check.disagreement(device) == "RuntimeError: no such instruction"


@in_the_ordinary_process
def test_a_machine_where_they_are_wrong_goes_the_plain_way(monkeypatch):
    from detpost.kernels.triton import trial as triton_check

    monkeypatch.delenv("DETPOST_KERNEL", raising=False)
    for reason, kind in (("the decode kernel gives other results", "aten"), (None, "triton")):
        kernels._triton_agrees.cache_clear()
        kernels._kind_for.cache_clear()
        monkeypatch.setattr(triton_check, "disagreement", lambda device, reason=reason: reason)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert kernels.kind_for("cuda") == kind
            assert kernels.kind_for("cuda") == kind
        assert [reason in str(entry.message) for entry in caught] == ([True] if reason else [])
    kernels._triton_agrees.cache_clear()
    kernels._kind_for.cache_clear()


@pytest.mark.gpu
def test_a_first_call_inside_a_capture_does_not_try():
    kernels._triton_agrees.cache_clear()
    kernels._kind_for.cache_clear()
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=5)
    logits, boxes = torch.randn(2, 6, 4, device="cuda"), torch.rand(2, 6, 4, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        found = post(logits, boxes)
    graph.replay()
    assert torch.equal(found.queries, post(logits, boxes).queries)
