"""What Dynamo, export and autograd say reaches the report with its line; what is clean passes every stage."""

import torch
import torch.nn.functional as F
from torch import nn

from detpost.purity import STAGES, check

x = torch.linspace(-1.0, 1.0, 12).reshape(4, 3)


def line_of(function, text):
    code = function.forward.__code__ if isinstance(function, nn.Module) else function.__code__
    import linecache

    for line in range(code.co_firstlineno, code.co_firstlineno + 40):
        if text in linecache.getline(code.co_filename, line):
            return line
    raise AssertionError(text)


def softmax_mean(x):
    return F.softmax(x, -1).mean(-1)


def branching(x):
    y = x * 2
    if y.sum() > 0:
        y = y + 1
    return y


def breaking(x):
    y = x * 2
    torch._dynamo.graph_break()
    return y + 1


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.LayerNorm(4), nn.Dropout(0.5))

    def forward(self, x):
        return {"logits": self.layers(x)}


def test_clean_code_passes_every_stage():
    for subject in (softmax_mean, Model(), Model().eval()):
        report = check(subject, x, gradcheck=True)
        assert report.clean, str(report)
        assert tuple(report.stages) == STAGES
        assert report.stages["graph breaks"] == "one graph, no breaks"
        assert report.stages["export"] == report.stages["backward"] == report.stages["gradcheck"] == "ok"
        assert report.stages["checkpoint"] == "same gradient"
        assert report.stages["recompiles"].startswith("none")
        if not torch.cuda.is_available():
            assert report.stages["cuda graph"] == "not checked: no CUDA"


def test_a_data_dependent_branch_breaks_the_graph_and_the_export_on_its_line():
    report = check(branching, x)
    line = line_of(branching, "if y.sum()")
    at_line = {f.rule for f in report.findings if f.line == line}
    assert at_line == {"DP011", "DP030", "DP040"}
    assert not report.ok


def test_every_graph_break_is_named_with_reason_and_line():
    def twice(x):
        print(x.shape, x)
        y = x + 1
        return y * y.sum().item()

    report = check(twice, x, only=("graph breaks",))
    assert {f.source for f in report.findings} == {"print(x.shape, x)", "return y * y.sum().item()"}
    assert all(f.rule == "DP030" and f.message for f in report.findings)
    (finding,) = check(breaking, x, only=("graph breaks",)).findings
    assert finding.line == line_of(breaking, "graph_break")


def test_state_that_changes_at_each_call_recompiles():
    report = check(Counting(), x, only=("recompiles",))
    assert [f.rule for f in report.findings if f.rule == "DP031"] == ["DP031"]
    assert "calls" in next(f.message for f in report.findings if f.rule == "DP031")


def test_a_batch_size_used_as_a_constant_recompiles_and_one_that_varies_does_not():
    weights = {size: torch.ones(size, 1) for size in (4, 5, 6)}
    report = check(lambda x: x * weights[x.shape[0]], x, only=("recompiles",))
    assert [f.rule for f in report.findings] == ["DP031"]
    assert check(softmax_mean, x, only=("recompiles",)).clean


def test_a_batch_size_that_the_subject_refuses_is_no_recompile():
    table = torch.ones(4, 1)
    report = check(lambda x: x.reshape(4, 3) * table, x, only=("recompiles",))
    assert report.clean
    assert "no other batch size" in report.stages["recompiles"]


def test_export_reports_its_first_reason_in_one_line():
    report = check(lambda x: x * (2 if x.sum() > 0 else 3), x, only=("export",))
    (finding,) = report.findings
    assert finding.rule == "DP040"
    assert "\n" not in finding.message
    assert report.stages["export"].startswith("refused: ")


def test_backward_that_fails_is_reported_where_the_saved_tensor_was_written():
    def overwritten(x):
        y = x.exp()
        y += 1
        return y

    report = check(overwritten, x.clone().requires_grad_(), only=("writes", "backward", "checkpoint"))
    assert {(f.rule, f.source) for f in report.errors} == {("DP001", "y += 1"), ("DP050", "y += 1")}
    assert report.stages["checkpoint"].startswith("not checked")


def test_a_wrong_gradient_fails_gradcheck_only_when_asked():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 3

    asked = check(lambda x: Wrong.apply(x), x, only=("gradcheck",))
    assert [f.rule for f in asked.errors] == ["DP051"]
    assert "gradcheck" not in check(lambda x: Wrong.apply(x), x, only=("backward",)).stages


def test_checkpointing_that_changes_the_gradient_is_an_error():
    calls = []

    def drifting(x):
        calls.append(None)
        return x * x * len(calls)

    first_passes = [3.0, 3.0]

    def different_when_recomputed(x):
        factor = first_passes.pop() if first_passes else 5.0
        return (x * factor).exp()

    report = check(drifting, x, only=("checkpoint",))
    assert report.stages["checkpoint"].startswith("not checked: two plain passes differ")

    class Accumulating(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(()))

        def forward(self, x):
            self.scale.mul_(2)
            return (x * self.scale.clone()).exp()

    report = check(Accumulating(), x, only=("checkpoint",))
    assert [f.rule for f in report.errors] == ["DP052"], str(report)


def test_a_gradient_that_is_not_finite_is_a_warning():
    report = check(lambda x: (x * 0).abs().sqrt(), x, only=("backward",))
    assert [(f.rule, f.severity) for f in report.findings] == [("DP053", "warning")]


def test_integers_and_code_without_gradients_are_no_failure():
    for subject, value in ((lambda n: n + 1, torch.arange(4)), (torch.no_grad()(softmax_mean), x)):
        report = check(subject, value, only=("backward", "checkpoint"))
        assert report.clean
        assert report.stages["backward"] == "nothing differentiable"


def test_training_mode_statistics_are_a_warning_and_evaluation_is_clean():
    layer = nn.BatchNorm1d(3)
    training = check(layer, x)
    assert training.ok, str(training)
    assert {f.rule for f in training.findings} == {"DP008"}
    assert check(layer.eval(), x).clean


def test_a_break_before_anything_was_captured_is_found():
    def counted(x):
        return x * len(x.nonzero())

    assert [f.source for f in check(counted, x, only=("graph breaks",)).findings] == ["return x * len(x.nonzero())"]
