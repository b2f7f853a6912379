"""The C++ kernels, held to the plain PyTorch forms."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import scipy.ndimage
import torch

from detpost import DecodeSpec, DetectionPostProcessor, kernels
from detpost.kernels.cpu import native, numpy_decode
from detpost.losses import distance_transform_edt, hausdorff_dt_loss, hausdorff_er_loss, hausdorff_er_loss_3d
from detpost.verify.compare import raw_cases

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"the C++ kernels are {native.missing()}")

SPECS = {
    "plain": DecodeSpec(),
    "threshold": DecodeSpec(score_threshold=0.3, top_k=50),
    "clip": DecodeSpec(clip=True, box_format="xywh"),
    "background first": DecodeSpec(background="first", box_format="xyxy"),
    "background last": DecodeSpec(background="last", top_k=10_000),
}


@pytest.fixture
def forced(monkeypatch):
    return lambda kind: monkeypatch.setenv("DETPOST_KERNEL", kind)


def assert_same(found, expected, case):
    for name in ("labels", "queries", "valid"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), (case, name)
    for name in ("scores", "boxes"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), msg=f"{case}: {name}", equal_nan=True)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("kind", ["native", "numpy"])
def test_the_decode_is_the_plain_one(forced, kind, name):
    post = DetectionPostProcessor(SPECS[name])
    taken = 0
    for case, (logits, boxes, sizes) in raw_cases(60, 50):
        variants = {
            "as it is": (logits, boxes, sizes),
            "normalised": (logits, boxes, None),
            "half, float sizes": (logits.half(), boxes.half(), sizes.float() + 0.5),
            "bfloat16, int32 sizes": (logits.bfloat16(), boxes, sizes.int()),
            "strided": (logits.transpose(1, 2).contiguous().transpose(1, 2), boxes.flip(1), sizes.flip(0)),
            "boxes beyond the image": (logits, boxes * 3 - 1, sizes),
            "a NaN box": (logits, torch.where(boxes > 0.9, torch.nan, boxes), sizes),
        }
        for variant, given in variants.items():
            forced("aten")
            expected = post(*given)
            forced(kind)
            found = kernels.decode(*given, post.spec)
            if kind == "numpy" and found is None:
                found = post(*given)
            else:
                taken += 1
            assert_same(found, expected, f"{case}, {variant}")
    assert taken > 10 or (kind == "numpy" and not numpy_decode.takes_spec(post.spec))


def test_gradients_exports_and_double_precision_go_the_plain_way(forced):
    forced("native")
    logits, boxes = torch.randn(1, 9, 4), torch.rand(1, 9, 4)
    spec = DecodeSpec()
    assert kernels.decode(logits, boxes, None, spec) is not None
    assert kernels.decode(logits.double(), boxes, None, spec) is None
    assert kernels.decode(logits, boxes.double(), None, spec) is None
    assert kernels.decode(logits, boxes.requires_grad_(), None, spec) is None
    with torch.no_grad():
        assert kernels.decode(logits, boxes, None, spec) is not None
    program = torch.export.export(DetectionPostProcessor(spec), (logits, torch.rand(1, 9, 4), torch.ones(1, 2)))
    assert "detpost" not in str(program.graph)
    post = DetectionPostProcessor(spec)
    grads = torch.func.vmap(torch.func.grad(lambda box: post(logits, box, None).boxes.sum()))(torch.rand(2, 1, 9, 4))
    assert grads.shape == (2, 1, 9, 4)


def test_compiled_code_calls_one_operator(forced):
    forced("native")
    torch.compiler.reset()
    seen = []

    def backend(graph, _):
        seen.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    post = DetectionPostProcessor.from_preset("rtdetr", score_threshold=0.4)
    given = torch.randn(2, 40, 30), torch.rand(2, 40, 4), torch.tensor([[10, 20], [30, 40]])
    compiled = torch.compile(post, fullgraph=True, backend=backend)
    assert_same(compiled(*given), post(*given), "compiled")
    assert len(seen) == 1
    assert sum("native_decode" in target for target in seen[0]) == 1


@pytest.mark.parametrize("shape", [(2, 5, 6), (1, 40, 30)])
def test_operators_keep_their_contract_with_the_compiler(shape):
    logits, boxes = torch.randn(shape), torch.rand(*shape[:2], 4)
    test = {"test_schema", "test_faketensor", "test_aot_dispatch_dynamic"}
    torch.library.opcheck(torch.ops.detpost.native_select, (logits.flatten(1), 7), test_utils=tuple(test))
    for sizes in (None, torch.ones(shape[0], 2)):
        torch.library.opcheck(
            torch.ops.detpost.native_decode, (logits, boxes, sizes, 7, -1, 0, True, 0.5), test_utils=tuple(test)
        )
    field = torch.rand(2, 3, 6, 7)
    torch.library.opcheck(torch.ops.detpost.native_distance, (field, [1.0, 1.0], True), test_utils=tuple(test))
    torch.library.opcheck(
        torch.ops.detpost.native_weighted_error,
        (field, torch.ones_like(field), [1.0, 0.5], 2.0, 2.0, 1e6, True),
        test_utils=tuple(test),
    )
    torch.library.opcheck(torch.ops.detpost.native_scaled, (field, torch.rand(2, 3, 1, 1)), test_utils=tuple(test))
    for keep, want in ((True, False), (False, True), (False, False)):
        arguments = (field, torch.randint(3, (2, 1, 6, 7)), torch.arange(3), [1.0, 4.0], 0.2, 2, None, keep, want)
        torch.library.opcheck(torch.ops.detpost.native_erosion, arguments, test_utils=tuple(test))


def blobs(*shape):
    """Probabilities with thick and thin errors, flat regions and shared extremes."""
    coarse = torch.rand(*shape[:2], *(-(-side // 4) for side in shape[2:]))
    fine = torch.nn.functional.interpolate(coarse, size=shape[2:])
    return (fine * 4).round().div(4).mul(0.98).add(0.01)


def value_and_gradients(loss, pred, *rest, **options):
    pred = pred.clone().requires_grad_()
    value = loss(pred, *rest, **options)
    weight = torch.linspace(-1, 1, value.numel()).reshape(value.shape) if value.dim() else None
    (gradient,) = torch.autograd.grad(value, pred, weight)
    return value.detach(), gradient


@pytest.mark.parametrize("make", [torch.rand, blobs, torch.zeros, torch.ones], ids=lambda make: make.__name__)
@pytest.mark.parametrize("shape", [(2, 3, 33, 47), (1, 2, 1, 16), (2, 2, 17, 1), (1, 2, 9, 20, 11), (1, 1, 3, 1, 40)])
@pytest.mark.parametrize("options", [{}, {"reduction": "none", "k": 3}, {"reduction": "sum", "alpha": 0.5, "k": 1}])
def test_the_erosion_loss_is_the_plain_one(forced, make, shape, options):
    pred = make(*shape)
    pred = pred / pred.sum(1, keepdim=True).clamp(min=1)
    target = (torch.rand(shape[0], 1, *shape[2:]) < 0.4).long().clamp(max=shape[1] - 1)
    loss = hausdorff_er_loss if len(shape) == 4 else hausdorff_er_loss_3d
    forced("aten")
    expected = value_and_gradients(loss, pred, target, **options)
    forced("native")
    found = value_and_gradients(loss, pred, target, **options)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    scale = float(expected[1].abs().max())
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5 * max(scale, 1e-3))


def test_a_gradient_of_the_gradient_is_the_plain_one(forced):
    pred, target = torch.rand(1, 2, 6, 6), torch.randint(2, (1, 1, 6, 6))

    def second(kind):
        forced(kind)
        given = pred.clone().requires_grad_()
        (first,) = torch.autograd.grad(hausdorff_er_loss(given, target, k=2), given, create_graph=True)
        return torch.autograd.grad(first.square().sum(), given)[0]

    expected = second("aten")
    assert expected.abs().max() > 0
    torch.testing.assert_close(second("native"), expected)


@pytest.mark.parametrize("shape", [(37, 53), (1, 70), (70, 1), (130, 16), (9, 20, 33), (1, 1, 5)])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("spacing", [None, (0.7, 2.0, 1.3)])
def test_distances_are_scipys(forced, shape, share, spacing):
    forced("native")
    mask = torch.rand(2, 2, *shape) < share
    steps = None if spacing is None else spacing[: len(shape)]
    found = distance_transform_edt(mask, steps)
    for image in range(2):
        for channel in range(2):
            expected = scipy.ndimage.distance_transform_edt(mask[image, channel].numpy(), sampling=steps)
            torch.testing.assert_close(
                found[image, channel], torch.from_numpy(expected).float(), rtol=1e-6 if steps else 2e-7, atol=1e-6
            )


@pytest.mark.parametrize("kind", ["one zero", "two far zeros", "stripe", "rising"])
def test_long_ways_to_the_nearest_zero(forced, kind):
    mask = torch.ones(1, 1, 700, 513, dtype=torch.bool)
    if kind == "one zero":
        mask[0, 0, 3, 500] = False
    elif kind == "two far zeros":
        mask[0, 0, 0, 0] = mask[0, 0, 699, 512] = False
    elif kind == "stripe":
        mask[0, 0, 350] = False
    else:
        mask = torch.arange(513)[None, None, None] > torch.arange(700)[None, None, :, None] * 0.01
    forced("native")
    expected = torch.from_numpy(scipy.ndimage.distance_transform_edt(mask[0, 0].numpy()))
    found = distance_transform_edt(mask)[0, 0].double()
    assert torch.equal(found.square().round(), expected.square().round())
    assert (found.square() - expected.square()).abs().max() < 0.1  # the square root alone rounds


@pytest.mark.parametrize("shape", [(2, 3, 30, 41), (1, 2, 9, 20, 11)])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_the_distance_loss_is_the_plain_one(forced, shape, share):
    pred, target = torch.rand(shape), (torch.rand(shape) < share).float()
    found = {}
    for kind in ("aten", "native"):
        forced(kind)
        options = {"include_background": True, "spacing": (2.0, 0.5, 1.0)[: len(shape) - 2]}
        for name, given in {"": {}, "sigmoid": {"sigmoid": True}, "alpha": {"alpha": 1.5, "batch": True}}.items():
            prediction = (pred - 0.5) * 4 if name == "sigmoid" else pred * share * 2
            for reduction in ("mean", "none"):
                case = {**options, **given, "reduction": reduction}
                found[kind, name, reduction] = value_and_gradients(hausdorff_dt_loss, prediction, target, **case)
    assert len(found) == 12
    for (_, *case), value in found.items():
        torch.testing.assert_close(value, found["aten", *case], rtol=1e-5, atol=1e-7, msg=lambda m, c=case: f"{c}: {m}")


def test_a_target_with_a_gradient_and_second_gradients_go_the_plain_way(forced):
    pred, target = torch.randn(1, 2, 8, 8), torch.rand(1, 2, 8, 8)

    def slopes(kind):
        forced(kind)
        given, truth = pred.clone().requires_grad_(), target.clone().requires_grad_()
        loss = hausdorff_dt_loss(given, truth, sigmoid=True, include_background=True)
        first = torch.autograd.grad(loss, (given, truth))
        loss = hausdorff_dt_loss(given, target, sigmoid=True, include_background=True)
        (again,) = torch.autograd.grad(loss, given, create_graph=True)
        return (*first, torch.autograd.grad(again.square().sum(), given)[0])

    expected = slopes("aten")
    assert all(part.abs().max() > 0 for part in expected)
    torch.testing.assert_close(slopes("native"), expected)


def test_threads_that_call_at_once_get_their_own_answers(forced):
    forced("native")
    post = DetectionPostProcessor(DecodeSpec())
    inputs = [(torch.randn(8, 300, 80), torch.rand(8, 300, 4), None) for _ in range(4)]
    masks = [torch.rand(1, 3, 150, 150) < 0.5 for _ in range(4)]
    expected = [(post(*given), distance_transform_edt(mask)) for given, mask in zip(inputs, masks, strict=True)]
    wrong = []

    def work(i):
        for _ in range(15):
            found, distance = post(*inputs[i]), distance_transform_edt(masks[i])
            if not torch.equal(found.queries, expected[i][0].queries) or not torch.equal(distance, expected[i][1]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[3],
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_has_threads_of_its_own():
    code = """
import os, torch
from detpost import select_top_k
rows = torch.randn(8, 40000)
first = select_top_k(rows, 50)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(select_top_k(rows, 50), first) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    done = run(code, DETPOST_KERNEL="native")
    assert done.returncode == 0, done.stderr[-300:]


def test_every_level_of_instructions_gives_the_same_answers():
    code = """
import torch
from detpost import DecodeSpec, DetectionPostProcessor
from detpost.verify.compare import raw_cases
from detpost.kernels.cpu import native
from detpost.losses import distance_transform_edt, hausdorff_er_loss
import hashlib
post, digest = DetectionPostProcessor(DecodeSpec()), hashlib.sha256()
for _, given in raw_cases(60, 50):
    found = post(*given)
    for part in (found.queries, found.labels, found.valid): digest.update(part.numpy().tobytes())
    digest.update(post(given[0].half(), *given[1:]).queries.numpy().tobytes())
torch.manual_seed(0)
digest.update(distance_transform_edt(torch.rand(2, 1, 90, 70) < 0.9).numpy().tobytes())
value = hausdorff_er_loss(torch.rand(2, 2, 30, 30), torch.randint(2, (2, 1, 30, 30)))
print(native.instructions().replace(" ", "_"), digest.hexdigest(), f"{float(value):.5g}")
"""
    found = [run(code, DETPOST_NATIVE=asked) for asked in ("baseline", "avx2", "")]
    assert not [done.stderr[-300:] for done in found if done.returncode]
    said = [done.stdout.split() for done in found]
    assert said[0][0] == "baseline_instructions"
    assert said[0][1:] == said[1][1:] == said[2][1:]


def test_the_choice_is_said_and_wrong_ones_are_refused(forced, monkeypatch):
    for kind in ("native", "numpy", "aten"):
        forced(kind)
        assert kernels.kind_for("cpu") == kind
        assert kernels.kind_for("mps") == "aten"
    forced("cuda")
    with pytest.raises(ValueError, match="must be one of native, numpy, triton, aten; got 'cuda'"):
        kernels.kind_for("cpu")
    monkeypatch.setattr(native, "_library", lambda: "not built: reinstall")
    kernels._kind_for.cache_clear()
    forced("native")
    with pytest.raises(RuntimeError, match="DETPOST_KERNEL=native, but detpost"):
        kernels.kind_for("cpu")
    forced("")
    assert kernels.kind_for("cpu") == "numpy"
    kernels._kind_for.cache_clear()
