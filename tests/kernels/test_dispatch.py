"""The dispatch always answers, and what writes a graph gets operators that every runtime has."""

import math

import pytest
import torch
from torch import nn

from detpost import DecodeSpec, DetectionPostProcessor
from detpost.kernels import dispatch
from detpost.kernels.cpu import library
from detpost.nms import NonMaximumSuppression
from detpost.reference.decode import decode as reference_decode


class AsTuple(nn.Module):
    """Raw outputs to a plain tuple, as runtimes for small devices want it."""

    def __init__(self, preset, suppress):
        super().__init__()
        self.post = DetectionPostProcessor.from_preset(preset, top_k=20)
        self.suppress = NonMaximumSuppression(0.5) if suppress else nn.Identity()

    def forward(self, logits, boxes, sizes):
        return tuple(self.suppress(self.post(logits, boxes, sizes)))


@pytest.mark.parametrize("suppress", [False, True])
@pytest.mark.parametrize("preset", ["rtdetr", "detr"])
def test_an_exported_graph_reads_no_tensor_as_another_dtype(preset, suppress):
    module = AsTuple(preset, suppress)
    raw = (torch.randn(1, 300, 60).round(), torch.rand(1, 300, 4), torch.tensor([[4, 5]]))
    program = torch.export.export(module, raw)
    for nodes in (program.graph.nodes, program.run_decompositions().graph.nodes):
        called = {str(node.target) for node in nodes if node.op == "call_function"}
        assert called
        assert not {name for name in called if "view" in name and "dtype" in name}
        assert not {name for name in called if "sort" in name or name.startswith("detpost")}
    for found, expected in zip(program.module()(*raw), module(*raw), strict=True):
        torch.testing.assert_close(found, expected)


def test_the_last_form_is_the_definition_and_takes_everything():
    for computation, forms in dispatch.FORMS.items():
        *others, last = forms
        assert last.kernel == "reference", computation
        assert last.takes()
        assert last.trial is None
        assert {form.kernel for form in others} <= {*dispatch.KERNELS, "graph", "transform"}


def never_asked(forms):
    """Name the forms that an earlier one of the same kernel leaves nothing to: that takes all that they take."""
    return [
        f"form {place} ({form.kernel})"
        for place, form in enumerate(forms)
        if any(
            earlier.kernel == form.kernel
            and earlier.takes is dispatch._anything
            and earlier.trial is None
            and (earlier.dtypes is None or (form.dtypes is not None and {*earlier.dtypes} >= {*form.dtypes}))
            and (earlier.watched is not None or form.watched is None)
            for earlier in forms[:place]
        )
    ]


@pytest.mark.parametrize("computation", dispatch.FORMS)
def test_every_form_is_asked_for_something(computation):
    forms = dispatch.FORMS[computation]
    assert never_asked(forms) == []
    *others, definition = forms
    assert {form.kernel for form in others} <= {kernel for asked in dispatch._ASKED.values() for kernel in asked}
    # A second form behind one that takes all it takes is found, and one that takes more is not.
    plain = dispatch.Form("aten", len, len, (torch.float32,))
    behind = dispatch.Form("aten", sum, sum, (torch.float32,), takes=lambda scores: True)
    wider = dispatch.Form("aten", sum, sum, (torch.float32, torch.float64))
    assert never_asked((*others, plain, behind, definition))[-1] == f"form {len(others) + 1} (aten)"
    assert never_asked((behind, plain, wider, definition)) == []


@pytest.mark.parametrize("kernel", dispatch.KERNELS)
def test_whatever_is_forced_there_is_an_answer(monkeypatch, kernel):
    if kernel == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("DETPOST_KERNEL", kernel)
    nothing = torch.tensor([[float("nan"), -float("inf"), float("nan")]])
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert dispatch.select(nothing.to(dtype), 2).tolist() == [[1, 0]]
        assert dispatch.select(torch.empty(0, 3, dtype=dtype), 2).shape == (0, 2)


@pytest.mark.parametrize("kernel", ["native", "numpy", "aten"])
@pytest.mark.parametrize(
    "spec",
    [
        DecodeSpec.preset("detr", top_k=3),
        DecodeSpec.preset("detr", top_k=50, score_threshold=0.4),
        DecodeSpec(activation="softmax", top_k=7, background="first", clip=True),
        DecodeSpec(selection="per_query", top_k=5, background="last"),
        DecodeSpec(top_k=40, score_threshold=0.5, background="last", box_format="xywh"),
    ],
    ids=str,
)
def test_what_is_selected_at_once_has_the_gradient_of_the_reference(monkeypatch, kernel, spec):
    if kernel == "native" and library.missing() is not None:
        pytest.skip(f"the C++ kernels are {library.missing()}")
    monkeypatch.setenv("DETPOST_KERNEL", kernel)
    torch.manual_seed(0)
    logits = torch.where(torch.rand(2, 12, 5) < 0.05, math.nan, torch.randn(2, 12, 5).mul(2).round() / 2)
    logits[1, 3, 2] = math.inf
    boxes, sizes, found = torch.rand(2, 12, 4), torch.tensor([[3, 4], [5.0, 6.0]]), []
    for decode in (lambda *given: dispatch.decode(*given, spec), lambda *given: reference_decode(*given, spec)):
        for wanting in ((True, True), (True, False), (False, True)):
            given = [value.clone().requires_grad_(wants) for value, wants in zip((logits, boxes), wanting, strict=True)]
            detections = decode(*given, sizes)
            total = detections.scores.square().sum() + detections.boxes.sin().sum()
            slopes = torch.autograd.grad(total, [value for value in given if value.requires_grad], allow_unused=True)
            found.append([*detections, *slopes])
    torch.testing.assert_close(found[:3], found[3:], rtol=1e-5, atol=1e-7)
    for first, second in zip(found[:3], found[3:], strict=True):
        assert torch.equal(first[1], second[1])
        assert torch.equal(first[3], second[3])
    assert float(found[0][5].abs().max()) > 0.1
