"""The losses inside a training step: compiled, checkpointed, under autocast, distributed, exported."""

import socket

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import nn
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from detpost.kernels.cpu import library
from detpost.losses import (
    BoundaryLoss,
    GeneralizedSurfaceLoss,
    HausdorffDTLoss,
    HausdorffERLoss,
    HausdorffERLoss3D,
    LogHausdorffDTLoss,
    distance_transform_edt,
)

LOSSES = {
    "erosion": (HausdorffERLoss(k=3), (9, 10)),
    "erosion 3d": (HausdorffERLoss3D(k=2), (4, 5, 6)),
    "distance": (HausdorffDTLoss(to_onehot_y=True), (9, 10)),
    "log distance 3d": (LogHausdorffDTLoss(to_onehot_y=True, spacing=(1.0, 2.0, 0.5)), (4, 5, 6)),
    "boundary": (BoundaryLoss(to_onehot_y=True), (9, 10)),
    "surface 3d": (GeneralizedSurfaceLoss(to_onehot_y=True, spacing=(1.0, 2.0, 0.5)), (4, 5, 6)),
}


class Step(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.loss, self.sides = LOSSES[name]

    def example(self, batch=2):
        return torch.randn(batch, 3, *self.sides), torch.randint(3, (batch, 1, *self.sides))

    def forward(self, logits, target):
        return self.loss(logits.softmax(1), target)


@pytest.fixture(params=LOSSES)
def step(request):
    torch._dynamo.reset()
    return Step(request.param)


def run(function, logits, target):
    leaf = logits.clone().requires_grad_()
    value = function(leaf, target)
    value.backward()
    return value.detach(), leaf.grad


def test_compiled_in_one_graph_equals_eager_forward_and_backward(step):
    logits, target = step.example()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, logits, target), run(step, logits, target), rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match=r"class ids in \[0, 3\); got ids from .* to 9"):
        compiled(logits, target.clone().fill_(9))


def thick(step, dtype):
    """Logits that are wrong nearly everywhere, so that every erosion counts, and a boundary for the distances."""
    logits, target = step.example()
    logits, target = logits.to(dtype) * 0.05, torch.zeros_like(target)
    logits[0, 1] = logits[0, 1] + 5
    target[..., :2, :2] = 1
    return logits, target


def force(kernel, monkeypatch):
    if kernel == "native" and library.missing() is not None:
        pytest.skip(f"the C++ kernels are {library.missing()}")
    monkeypatch.setenv("DETPOST_KERNEL", kernel)


FORMS = pytest.mark.parametrize(
    ("kernel", "dtype"),
    [("native", torch.float32), ("aten", torch.float32), ("aten", torch.float64)],
    ids=["native", "plain", "double"],
)


@FORMS
@pytest.mark.parametrize("how", ["jvp", "dual numbers", "compiled jvp", "linearize"])
def test_forward_mode_gives_the_gradient_along_a_direction(step, how, kernel, dtype, monkeypatch):
    force(kernel, monkeypatch)
    logits, target = thick(step, dtype)
    direction = torch.randn_like(logits)
    value, gradient = run(step, logits, target)
    if how == "dual numbers":
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(step(forward_ad.make_dual(logits, direction), target))
    elif how == "linearize":
        found = step(logits, target), torch.func.linearize(lambda given: step(given, target), logits)[1](direction)
    else:

        def along(given, change):
            return torch.func.jvp(lambda prediction: step(prediction, target), (given,), (change,))

        forward = torch.compile(along, fullgraph=True, backend="aot_eager") if how == "compiled jvp" else along
        found = forward(logits, direction)
    expected = (gradient * direction).sum()
    assert expected.abs() > 1e-3, "there is nothing to see"
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(tuple(found), (value, expected), rtol=tolerance, atol=tolerance, check_dtype=False)


@FORMS
def test_second_derivatives_are_those_of_the_gradient(step, kernel, dtype, monkeypatch):
    """Against differences of the gradient in double precision; once back twice, once forward over back."""
    force(kernel, monkeypatch)
    logits, target = thick(step, dtype)
    direction = torch.randn_like(logits)
    moved = [run(step, logits.double() + sign * 1e-5 * direction, target)[1] for sign in (1, -1)]
    expected = (moved[0] - moved[1]) / 2e-5
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(step(leaf, target), leaf, create_graph=True)
    (twice,) = torch.autograd.grad((gradient * direction).sum(), leaf)
    _, over = torch.func.jvp(torch.func.grad(lambda given: step(given, target)), (logits,), (direction,))
    scale = float(expected.abs().max())
    assert scale > 1e-4, "there is nothing to see"
    for found in (twice, over):
        torch.testing.assert_close(found.double() / scale, expected / scale, rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["erosion 3d", "distance"])
def test_inductor_equals_eager(name):
    step = Step(name)
    logits, target = step.example()
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(run(compiled, logits, target), run(step, logits, target), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_equals_eager(step, reentrant):
    logits, target = step.example()
    actual = run(lambda x, t: checkpoint(step, x, t, use_reentrant=reentrant), logits, target)
    torch.testing.assert_close(actual, run(step, logits, target), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_finite_and_computes_in_float32(step, dtype):
    logits, target = step.example()
    layer = nn.Conv2d(3, 3, 1) if len(step.sides) == 2 else nn.Conv3d(3, 3, 1)
    with torch.autocast("cpu", dtype=dtype):
        halves = layer(logits).softmax(1)
        value = step.loss(halves, target)
    value.backward()
    assert halves.dtype == dtype
    assert value.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    torch.testing.assert_close(value, step.loss(halves.float(), target))


def test_inputs_are_not_written_to(step):
    logits, target = step.example()
    versions = logits._version, target._version
    run(step, logits, target)
    assert (logits._version, target._version) == versions


def test_training_lowers_the_loss(step):
    logits, target = step.example()
    target = torch.zeros_like(target)
    target[..., 1:-1, 1:-1] = 1
    logits = logits.requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.3)
    first = step(logits, target).detach()
    for _ in range(30):
        optimizer.zero_grad()
        step(logits, target).backward()
        optimizer.step()
    assert step(logits, target) < 0.5 * first


@pytest.mark.parametrize("strict", [True, False])
def test_exported_program_equals_eager(step, strict):
    example = step.example()
    program = torch.export.export(step, example, strict=strict)
    logits, target = step.example()
    torch.testing.assert_close(program.module()(logits, target), step(logits, target), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.filterwarnings("ignore")
def test_onnx_equals_eager(step, dynamo, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = str(tmp_path / "loss.onnx")
    torch.onnx.export(step, step.example(), path, input_names=["logits", "target"], dynamo=dynamo, verbose=False)
    logits, target = step.example()
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (value,) = session.run(None, {"logits": logits.numpy(), "target": target.numpy()})
    torch.testing.assert_close(torch.from_numpy(value), step(logits, target), rtol=1e-5, atol=1e-6)


def test_the_transform_exports_beyond_one_block_of_rows(tmp_path):
    """Export takes the rows in blocks: 20 rows need three, the last one short."""

    class Transform(nn.Module):
        def forward(self, mask):
            return distance_transform_edt(mask, (1.0, 2.0))

    mask = torch.rand(1, 2, 20, 11) > 0.2
    program = torch.export.export(Transform(), (mask,))
    assert torch.equal(program.module()(mask), distance_transform_edt(mask, (1.0, 2.0)))


def _layer():
    torch.manual_seed(1)
    return nn.Conv2d(3, 3, 3, padding=1)


def _gradient_of_one_process(rank, port, name, logits, target, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        model = DistributedDataParallel(_layer())
        half = slice(rank * 2, rank * 2 + 2)
        LOSSES[name][0](model(logits[half]).softmax(1), target[half]).backward()
        if rank == 0:
            torch.save(model.module.weight.grad, results)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["erosion", "distance"])
def test_two_processes_give_the_gradient_of_one(name, tmp_path):
    logits, target = Step(name).example(batch=4)
    model = _layer()
    LOSSES[name][0](model(logits).softmax(1), target).backward()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = str(tmp_path / "gradient.pt")
    torch.multiprocessing.spawn(_gradient_of_one_process, (port, name, logits, target, results), nprocs=2)
    torch.testing.assert_close(torch.load(results, weights_only=True), model.weight.grad, rtol=1e-5, atol=1e-7)
