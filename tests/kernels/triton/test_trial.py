"""The Triton kernels behind the public functions, and the trial that decides whether they serve."""

import importlib.util
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from detpost import DetectionPostProcessor, kernels, select_top_k
from detpost.kernels import direct, dispatch, serving
from detpost.kernels.triton import decode as triton_decode
from detpost.kernels.triton import distance as triton_distance
from detpost.kernels.triton import erosion as triton_erosion
from detpost.kernels.triton import select as triton_select
from detpost.kernels.triton import trial
from detpost.losses import distance_transform_edt, hausdorff_dt_loss, hausdorff_er_loss, hausdorff_er_loss_3d
from detpost.reference.decode import decode
from tests.kernels.triton.harness import INTERPRETED, assert_passes_interpreted, in_the_ordinary_process, on_each_device


@in_the_ordinary_process
@pytest.mark.slow
def test_everything_under_the_interpreter():
    assert_passes_interpreted(__file__, at_least=26)


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


def small(monkeypatch):
    """Segments and long rows that an interpreter gets through; on a GPU they stay as they are."""
    if INTERPRETED:
        monkeypatch.setattr(triton_select, "_SEGMENT", 300)
        monkeypatch.setattr(trial, "_SHORT", 211)
        monkeypatch.setattr(trial, "_LONG", 701)


@on_each_device
def test_every_trial_passes(device, monkeypatch):
    small(monkeypatch)
    assert trial.everything(device) is None


CHOICES = ("sigmoid", "flat", "none", "cxcywh", False)


def wrong_where(name, module, spoil, concerns):
    """Wrap a function of a module: its result is spoilt for the arguments that it concerns."""
    right = getattr(module, name)
    return module, name, lambda *given: spoil(right(*given)) if concerns(*given) else right(*given)


def flip(indices):
    return indices.flip(1)


def shift(detections):
    return detections._replace(boxes=detections.boxes + 1)


def swap(detections):
    return detections._replace(queries=detections.queries.flip(1))


def half_a_step(detections):
    return detections._replace(scores=torch.nextafter(detections.scores, torch.ones_like(detections.scores)))


F32, F16, BF16, I64 = torch.float32, torch.float16, torch.bfloat16, torch.int64
SOFTMAX, PER_QUERY = ("softmax", *CHOICES[1:]), ("sigmoid", "per_query", *CHOICES[2:])
# What is planted, the trial that must see it, and one that must not, as the code that it tries is right.
WRONG = {
    "float16 selection": (
        wrong_where("select", triton_select, flip, lambda scores, k: scores.dtype == F16),
        ("selection", F16, 9),
        ("selection", F32, 9),
    ),
    "bfloat16 selection": (
        wrong_where("select", triton_select, flip, lambda scores, k: scores.dtype == BF16),
        ("selection", BF16, 9),
        ("selection", F16, 9),
    ),
    "selection from long rows": (
        wrong_where("select", triton_select, flip, lambda scores, k: scores.shape[1] == trial._LONG),
        ("selection", F32, 9),
        ("decode", F32, F32, I64, 9, *CHOICES),
    ),
    "selection of many": (
        wrong_where("select", triton_select, flip, lambda scores, k: k > 100),
        ("selection", F32, 120),
        ("selection", F32, 9),
    ),
    "softmax": (
        wrong_where("decode", triton_decode, swap, lambda *given: given[3].activation == "softmax"),
        ("decode", F32, F32, I64, 9, *SOFTMAX),
        ("decode", F32, F32, I64, 9, *CHOICES),
    ),
    "a bit of a softmax score": (
        wrong_where("decode", triton_decode, half_a_step, lambda *given: given[3].activation == "softmax"),
        ("decode", F32, F32, I64, 9, *SOFTMAX),
        ("decode", F32, F32, I64, 9, *CHOICES),
    ),
    "per query": (
        wrong_where("decode", triton_decode, swap, lambda *given: given[3].selection == "per_query"),
        ("decode", F32, F32, I64, 9, *PER_QUERY),
        ("decode", F32, F32, I64, 9, *CHOICES),
    ),
    "boxes of half logits": (
        wrong_where("decode", triton_decode, shift, lambda *given: given[0].dtype == F16),
        ("decode", F16, F32, I64, 9, *CHOICES),
        ("decode", F32, F32, I64, 9, *CHOICES),
    ),
    "half boxes": (
        wrong_where("decode", triton_decode, shift, lambda *given: given[1].dtype == F16),
        ("decode", F32, F16, I64, 9, *CHOICES),
        ("decode", F32, F32, I64, 9, *CHOICES),
    ),
    "no image sizes": (
        wrong_where("decode", triton_decode, shift, lambda *given: given[2] is None),
        ("decode", F32, F32, None, 9, *CHOICES),
        ("decode", F32, F32, I64, 9, *CHOICES),
    ),
    "decode of long rows": (
        wrong_where("decode", triton_decode, swap, lambda *given: given[0][0].numel() >= trial._LONG),
        ("decode", F32, F32, I64, 9, *CHOICES),
        ("selection", F32, 9),
    ),
    "a threshold": (
        wrong_where("decode", triton_decode, shift, lambda *given: given[3].score_threshold is not None),
        ("decode", F32, F32, I64, 9, *CHOICES),
        ("selection", F32, 9),
    ),
    "a squared distance": (
        wrong_where("squared_distance", triton_distance, lambda found: (found[0] + 1, found[1]), lambda *_: True),
        ("losses",),
        ("selection", F32, 9),
    ),
    "a distance in unequal spacing": (
        wrong_where(
            "squared_distance",
            triton_distance,
            lambda found: (found[0] * 1.001, found[1]),
            lambda _, spacing: len(set(spacing)) > 1,
        ),
        ("losses",),
        ("selection", F32, 9),
    ),
    "a distance to both sides": (
        wrong_where(
            "squared_boundary_distance", triton_distance, lambda found: (found[0] + 1, found[1]), lambda *_: True
        ),
        ("losses",),
        ("selection", F32, 9),
    ),
    "an erosion of a volume": (
        wrong_where(
            "erode", triton_erosion, lambda found: (found[0] * 1.01, *found[1:]), lambda pred, *_: pred.ndim == 5
        ),
        ("losses",),
        ("selection", F32, 9),
    ),
    "the gradient of an erosion": (
        wrong_where("erosion_gradient", triton_erosion, lambda found: found * 1.01, lambda *_: True),
        ("losses",),
        ("selection", F32, 9),
    ),
}


@on_each_device
@pytest.mark.parametrize("name", WRONG)
def test_a_trial_sees_what_is_wrong_in_its_own_code_alone(device, monkeypatch, name):
    small(monkeypatch)
    planted, concerned, unconcerned = WRONG[name]
    monkeypatch.setattr(*planted)
    function, *arguments = concerned
    assert "gives other results than PyTorch" in getattr(trial, function)(device, *arguments)
    function, *arguments = unconcerned
    assert getattr(trial, function)(device, *arguments) is None


@on_each_device
def test_a_kernel_that_does_not_run_is_said_in_one_line(device, monkeypatch):
    def fails(*_):
        raise RuntimeError("no such instruction\nand pages of it")

    small(monkeypatch)
    monkeypatch.setattr(triton_distance, "squared_distance", fails)
    assert trial.losses(device) == "the distance kernel: RuntimeError: no such instruction"


@pytest.fixture
def untried(monkeypatch):
    """As in a process that forces nothing and has tried nothing, where Triton would be the default."""
    monkeypatch.delenv("DETPOST_KERNEL", raising=False)
    monkeypatch.setattr(serving, "_TRIED", {})
    monkeypatch.setattr(dispatch, "_serving", lambda *_: "triton")
    monkeypatch.setattr(direct, "_extension", lambda: None)  # would answer on the CPU before anything is chosen


@on_each_device
def test_what_failed_its_trial_is_not_chosen_and_all_else_is(device, monkeypatch, untried):
    small(monkeypatch)
    monkeypatch.setattr(*WRONG["softmax"][0])
    logits, boxes = torch.randn(2, 6, 4, device=device), torch.rand(2, 6, 4, device=device)
    ran = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for preset in ("rtdetr", "detr", "detr", "rtdetr"):
            post = DetectionPostProcessor.from_preset(preset, top_k=5)
            post(logits, boxes)  # tries
            with Seen() as seen:
                found = post(logits, boxes)
            ran[preset] = any("triton_decode" in name for name in seen.names)
            expected = decode(logits, boxes, None, post.spec)
            assert torch.equal(found.queries, expected.queries)
    assert ran == {"rtdetr": True, "detr": False}
    said = [str(entry.message) for entry in caught if "without its Triton kernels" in str(entry.message)]
    assert said == ["detpost computes without its Triton kernels: the decode kernel gives other results than PyTorch"]
    assert [key[1:3] for key, wrong in serving._TRIED.items() if wrong] == [("decode", F32)]


@on_each_device
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_each_choice_is_tried_before_it_runs(device, monkeypatch, untried, dtype):
    tried = []
    for name in ("selection", "decode", "losses"):
        monkeypatch.setattr(trial, name, lambda device, *given, name=name: tried.append((name, *given)))
    logits, boxes = torch.randn(2, 6, 4, device=device, dtype=dtype), torch.rand(2, 6, 4, device=device)
    for _ in range(2):
        DetectionPostProcessor.from_preset("detr", top_k=5)(logits, boxes, torch.ones(2, 2, device=device))
        select_top_k(logits.flatten(1), 3)
        distance_transform_edt(torch.ones(1, 1, 4, 5, device=device))
    choices = ("softmax", "per_query", "last", "cxcywh", False)
    assert tried == [("decode", dtype, F32, F32, 5, *choices), ("selection", dtype, 3), ("losses",)]


@in_the_ordinary_process
def test_triton_is_the_form_for_cuda_where_it_is_installed(monkeypatch):
    monkeypatch.delenv("DETPOST_KERNEL", raising=False)
    for installed, kind in ((object(), "triton"), (None, "aten")):
        serving._kernel_for.cache_clear()
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, installed=installed: installed)
        assert kernels.kernel_for("cuda") == kind
    serving._kernel_for.cache_clear()


@pytest.mark.gpu
def test_a_first_call_inside_a_capture_does_not_try(monkeypatch):
    monkeypatch.setattr(serving, "_TRIED", {})
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=5)
    logits, boxes = torch.randn(2, 6, 4, device="cuda"), torch.rand(2, 6, 4, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        found = post(logits, boxes)
    assert not serving._TRIED
    graph.replay()
    assert torch.equal(found.queries, post(logits, boxes).queries)
