"""The decode in C++ and in NumPy, held to the plain PyTorch form."""

import warnings

import pytest
import torch

from detpost import DecodeSpec, DetectionPostProcessor, kernels
from detpost.kernels import dispatch
from detpost.kernels.aten import gradient
from detpost.kernels.cpu import decode as native_decode
from detpost.kernels.cpu import decode_back, library, numpy_decode
from detpost.verify.compare import raw_cases

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=f"the C++ kernels are {library.missing()}")

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
            assert_same(kernels.decode(*given, post.spec), expected, f"{case}, {variant}")
            taken += kind == "native" or numpy_decode._decode(*given, post.spec) is not None
    assert taken > 10


def test_derivatives_exports_and_double_precision_go_ways_of_their_own(forced):
    forced("native")
    logits, boxes = torch.randn(1, 9, 4), torch.rand(1, 9, 4)
    spec = DecodeSpec()

    def runs(logits, boxes, spec=spec):
        return dispatch._form("decode", logits, logits, boxes, None, spec)

    definition = dispatch.FORMS["decode"][-1].run
    assert runs(logits, boxes) is native_decode.decode
    assert runs(logits.double(), boxes) is definition
    assert runs(logits, boxes.double()) is definition
    with_gradient = runs(logits, boxes.requires_grad_())
    assert with_gradient.func is gradient.decode
    assert with_gradient.keywords == {"without_gradient": native_decode.decode, "back": decode_back.decode_back}
    assert runs(logits, boxes, DecodeSpec(clip=True)) is definition
    assert runs(logits, boxes, DecodeSpec(activation="softmax")) is definition
    with torch.no_grad():
        assert runs(logits, boxes) is native_decode.decode
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
            torch.ops.detpost.native_decode,
            (logits, boxes, sizes, 7, True, False, -1, 0, True, 0.5),
            test_utils=tuple(test),
        )


@pytest.mark.parametrize("kernel", ["native", "numpy"])
@pytest.mark.parametrize("box_format", ["xyxy", "xywh", "cxcywh"])
@pytest.mark.parametrize("sizes", [None, torch.tensor([[10, 20]])], ids=["units", "pixels"])
def test_odd_boxes_are_clipped_as_by_definition_signs_of_zeros_too(kernel, box_format, sizes, forced):
    numbers = torch.tensor([0.0, -0.0, 0.5, -1.5, 3.0, torch.inf, -torch.inf, torch.nan, 1e38, -1e-30])
    boxes = torch.cartesian_prod(*[numbers] * 4)[None]
    logits = torch.linspace(3, -3, boxes.shape[1])[None, :, None]
    spec = DecodeSpec(top_k=boxes.shape[1], box_format=box_format, clip=True)
    forced("aten")
    expected = DetectionPostProcessor(spec)(logits, boxes, sizes).boxes
    forced(kernel)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = DetectionPostProcessor(spec)(logits, boxes, sizes).boxes
    assert torch.equal(found.nan_to_num(nan=-7), expected.nan_to_num(nan=-7))
    numbers = ~expected.isnan()
    assert torch.equal(found.signbit()[numbers], expected.signbit()[numbers])
