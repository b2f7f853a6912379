"""The checker changes nothing that it is given, and never raises what its subject raises."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from detpost.purity import check

FAST = ("writes", "backward", "checkpoint")
x = torch.linspace(-1.0, 1.0, 6).reshape(2, 3)


class Busy(nn.Module):
    """Writes everything within reach."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.tied = self.weight
        self.register_buffer("total", torch.zeros(()))
        self.norm = nn.BatchNorm1d(3)
        self.history = []
        self.plain = torch.zeros(3)
        self.last = None

    def forward(self, inputs):
        inputs["x"].mul_(2)
        inputs.pop("unused", None)
        with torch.no_grad():
            self.weight.add_(1)
        self.total += 1
        self.plain.add_(1)
        self.history.append(1)
        self.last = inputs["x"]
        return self.norm(inputs["x"] * self.weight * self.tied) + torch.rand(()) + random.random()


def test_inputs_modules_and_generators_are_left_as_they_were():
    module = Busy()
    inputs = {"x": x.clone().requires_grad_(), "unused": x.clone()}
    parameters, state = dict(module.named_parameters()), copy.deepcopy(module.state_dict())
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    report = check(module, inputs)
    assert not report.ok
    assert set(inputs) == {"x", "unused"}
    assert torch.equal(inputs["x"], x)
    assert inputs["x"].grad is None
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert all(value is parameters[name] for name, value in module.named_parameters())
    assert module.tied is module.weight
    assert module.weight.grad is None
    assert (module.history, module.last, module.plain.tolist()) == ([], None, [0.0, 0.0, 0.0])
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert random.getstate() == python_state


def test_tied_parameters_stay_tied_in_the_copy():
    targets = {(f.target, f.name) for f in check(Busy(), {"x": x}, only=("writes",)).findings}
    assert ("parameter", "weight") in targets


def test_entries_taken_out_of_an_input_are_reported():
    report = check(Busy(), {"x": x, "unused": x}, only=("writes",))
    assert any(f.rule == "DP070" and f.severity == "error" for f in report.findings)


@pytest.mark.parametrize("error", [KeyError("missing"), RuntimeError(), SystemExit(3), NotImplementedError("later")])
def test_a_subject_that_raises_is_reported_with_its_error_and_line(error):
    def raising(x):
        y = x.clone()
        y += 1
        raise error

    report = check(raising, x)
    assert not report.ok
    (finding,) = [f for f in report.findings if f.rule == "DP090"]
    assert finding.source == "raise error"
    assert type(error).__name__ in finding.message
    assert any(f.source == "y += 1" for f in report.findings), "what happened before the error is reported too"
    assert all(outcome.startswith(("not checked", "recorded")) for outcome in report.stages.values())


def test_wrong_arguments_and_things_that_cannot_be_called_are_findings():
    for subject, args in ((lambda: 1, (x,)), (nn.Linear(5, 2), (x,)), (3, (x,)), (len, ())):
        report = check(subject, *args)
        assert [f.rule for f in report.findings] == ["DP090"]


def test_in_place_writes_that_autograd_refuses_are_still_found():
    def refused(x):
        x += 1
        return x

    report = check(refused, x.clone().requires_grad_())
    assert {"DP001", "DP090"} == {f.rule for f in report.findings}
    assert {f.source for f in report.findings} == {"x += 1"}


def test_odd_subjects_are_checked_without_an_exception():
    class Callable:
        def __init__(self):
            self.model = nn.BatchNorm1d(3)

        def __call__(self, x):
            return self.model(x)

        def method(self, x):
            return self.model(x) * 2

    import functools

    owner = Callable()
    lazy = nn.LazyLinear(2)
    subjects = [
        owner,
        owner.method,
        functools.partial(torch.mul, 2.0),
        torch.sigmoid,
        lazy,
    ]
    for subject in subjects:
        report = check(subject, x, only=FAST)
        assert report.ok, str(report)
    assert check(torch.jit.script(nn.ReLU()), x, only=("writes",)).clean
    assert owner.model.num_batches_tracked.item() == 0
    assert type(lazy) is nn.LazyLinear


def test_odd_inputs_are_checked_without_an_exception():
    def summed(value, *rest, **named):
        return sum(tensor.sum() for tensor in (value, *rest, *named.values()) if isinstance(tensor, torch.Tensor))

    strided = torch.arange(12.0).reshape(3, 4).t()[::2]
    for args in ((x, "text", None, 3.0), (torch.empty(0, 3),), (torch.tensor(1.0),), (strided,), (x.half(), x.bool())):
        assert check(summed, *args, only=FAST, keyword=x).ok
    assert check(summed, x.to_sparse(), only=("writes",)).subject.endswith("summed")


def test_only_takes_known_stages():
    with pytest.raises(ValueError, match="not stages; choose among writes"):
        check(torch.sigmoid, x, only=("speed",))
