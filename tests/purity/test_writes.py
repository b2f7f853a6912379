"""Each planted fault is found on its own line, named for what it is, and nothing else is."""

import inspect
import re
from collections import namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detpost.purity import check

Pair = namedtuple("Pair", ["first", "second"])
x = torch.linspace(-1.0, 1.0, 6).reshape(2, 3)


def planted_input(x):
    x += 1  # expect: DP001 error input
    return x


def planted_input_integers(n):
    n.add_(1)  # expect: DP003 error input
    return n


def planted_view(x):
    row = x[0]
    row.mul_(2)  # expect: DP003 error view of an input
    return x


def planted_transposed_view(x):
    x.T[0] = 1.0  # expect: DP002 error view of an input
    return x


def planted_unrelated_view(x):
    flat = x.reshape(-1).unsqueeze(0)
    flat[:, 2:4] -= 1  # expect: DP001 error view of an input
    return x


def planted_nested(inputs, *, extra):
    inputs["maps"][0].zero_()  # expect: DP003 error input
    extra[1] = 0.0  # expect: DP002 error view of an input
    return inputs["maps"][0] + extra


def planted_saved(x):
    y = x.sigmoid()
    y += 1  # expect: DP001 error saved for backward
    return y


def planted_saved_by_product(x):
    a, b = x * 2, x + 1
    c = a * b
    a.zero_()  # expect: DP003 error saved for backward
    return c


def planted_temporary(x):
    y = x * 2
    y += 1  # expect: DP001 note temporary
    return y


def planted_temporary_filled(x):
    y = torch.zeros(2, 3)
    y[0] = 1.0  # expect: DP002 note temporary
    y.clamp_(max=0.5)  # expect: DP003 note temporary
    return x + y


def planted_mask(x):
    x[x > 0] = 0.0  # expect: DP002 error input; ?DP010 error
    return x


def planted_mask_with_values(x):
    y = x * 1.0
    y[y > 0] = y[y > 0] * 2  # expect: DP002 note temporary; DP010 error; DP020 error
    return y


def stored_over_lines(x):
    y = x.clone()
    y[0,] = x.sum()  # the store begins two lines up
    return y


def planted_functional_inplace(x):
    return F.relu(x, inplace=True)  # expect: DP005 error input


def planted_out(x):
    y = torch.empty(2, 3)
    torch.add(x, 1, out=y)  # expect: DP004 note temporary
    return y


def planted_init(x):
    y = torch.empty(2, 3)
    nn.init.ones_(y)  # expect: DP003 note temporary
    return x + y


def planted_data(x):
    x.data.add_(1)  # expect: DP006 error view of an input
    return x


def planted_data_read(x):
    return x.data * 2  # expect: DP006 warning


def planted_foreach(x):
    torch._foreach_add_([x, torch.zeros(3)], 1.0)  # expect: DP003 error input; DP003 note temporary
    return x


def planted_numpy_write(x):
    array = x.detach().numpy()  # expect: DP007 error input; DP010 error
    array.fill(5)
    return x


def planted_item(x):
    return x * x.max().item()  # expect: DP010 error


def planted_float(x):
    return x * float(x[0, 0])  # expect: DP010 error


def planted_int_index(x):
    return x[int(x.argmax()) // 3]  # expect: DP010 error


def planted_tensor_index(x):
    return x[x.sum().long() * 0]  # expect: DP010 error


def planted_range(x):
    for _ in range((x > 0).sum()):  # expect: DP010 error
        x = x * 2
    return x


def planted_branch(x):
    if x.sum() > 5:  # expect: DP011 error
        return x
    return -x


def planted_any(x):
    if (x > 0).any():  # expect: DP011 error
        x = x * 2
    return x


def planted_assert(x):
    if not torch.equal(x, x):  # expect: DP010 error
        raise ValueError
    return x * 2


def planted_tolist(x):
    return x * sum(x.flatten().tolist())  # expect: DP010 error


def planted_cpu(x):
    return x.cpu() * 2  # expect: DP010 error


def planted_to_cpu(x):
    return x.to("cpu") * 2  # expect: DP010 error


def planted_numpy(x):
    return torch.from_numpy(np.asarray(x.detach()) * 2)  # expect: DP010 error


def planted_print(x):
    print(x)  # expect: DP010 error
    return x * 2


def planted_format(x):
    return x * len(f"{x[0, 0]:.2f}")  # expect: DP010 error


def planted_tensor_of_tensors(x):
    return x * torch.tensor([x[0, 0], x[0, 1], 1.0])  # expect: DP010 error


def planted_nonzero(x):
    return x * len(x.nonzero())  # expect: DP010 error; DP020 error


def planted_where(x):
    return torch.where(x > 0)[0]  # expect: DP010 error; DP020 error


def planted_boolean_index(x):
    return x[x > 0]  # expect: DP010 error; DP020 error


def planted_masked_select(x):
    return torch.masked_select(x, x > 0)  # expect: DP010 error; DP020 error


def planted_unique(n):
    return torch.unique(n)  # expect: DP010 error; DP020 error


def planted_repeat(x):
    return x.repeat_interleave(torch.tensor([1, 2]), 0)  # expect: DP010 error; DP020 error


def planted_two_faults(x):
    y = x.exp()
    y.mul_(2)  # expect: DP003 error saved for backward
    return y[y > 0]  # expect: DP010 error; DP020 error


class PlantedBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x):
        self.seen.add_(1)  # expect: DP003 error buffer
        return x + self.seen


class PlantedParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        with torch.no_grad():
            self.weight[0] = 2.0  # expect: DP002 error parameter
        return x * self.weight


class PlantedActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.activation(x)  # expect: DP005 error input


class PlantedActivationOfTemporary(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))

    def forward(self, x):
        return self.layers(x)  # expect: DP005 note temporary


class PlantedAttribute(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1  # expect: DP070 warning
        return x * 2


class PlantedStatistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(x)  # expect: DP008 warning buffer


class PlantedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def clean_custom_function(x):
    return PlantedBackward.apply(x)


def clean_operators(x):
    maps = F.interpolate(x[None, None], scale_factor=2, mode="bilinear")
    classes = F.one_hot(x.argmax(-1), 3).to(x.dtype)
    values, order = x.sort(-1)
    gathered = x.gather(1, order)
    parts = torch.cat([values, gathered, F.layer_norm(x, (3,)), F.pad(x, (0, 0))])
    chosen = torch.where(x > 0, x, 0.0).masked_fill(x > 0.5, 1.0)
    return maps.sum() + classes.sum() + parts.std() + chosen.sum() + F.softmax(x, -1).topk(2).values.sum()


def clean_fills_inside_torch(x):
    rows = nn.utils.rnn.pad_sequence([x[0], x[1, :2]])
    return rows.sum() + torch.block_diag(x, x).sum() + F.dropout(x, 0.5, True).sum()


if torch.__version__ >= (2, 12):  # that of 2.11 waits for a value

    def clean_quantile(x):
        return torch.quantile(x, 0.5)


def clean_attention(x):
    heads = x[None, None]
    causal = torch.ones(2, 2, dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(heads, heads, heads, attn_mask=causal)


def clean_out_of_place(x):
    y = x.scatter(1, torch.zeros(2, 1, dtype=torch.long), 1.0)
    y = y.index_put((torch.tensor([0]),), torch.zeros(3))
    return y.index_add(0, torch.tensor([1]), torch.ones(1, 3)).clamp(0).to(x.device).to(torch.float32)


def clean_named_tuple(x):
    return Pair(x + 1, {"more": [x * 2, "text", None]})


def clean_branch_on_shape(x, k, name="a", flag=True):
    if x.shape[0] > 1 and flag and k:
        x = x * k
    return x + len(name)


def clean_list_writes(x):
    parts = [x, x]
    parts[0] = x * 2
    parts += [x]
    count = 0
    count += len(parts)
    return torch.stack(parts) * count


@torch.no_grad()
def clean_without_gradient(x):
    return x.sigmoid() * 2


def clean_checkpoint(x):
    return torch.utils.checkpoint.checkpoint(lambda a: (a * 2).exp(), x, use_reentrant=False)


def clean_vmap(x):
    return torch.vmap(lambda row: row * row.sum())(x)


class CleanModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(5).eval()
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Dropout(0.5), nn.LayerNorm(6))

    def forward(self, x):
        return self.layers(self.norm(self.attention(x, x, x)[0]))


def expected(subject):
    """(line, rule, severity, target) for each ``# expect:`` comment in the subject's source.

    And those with a ``?``, which hang on how PyTorch computes it: 2.11 counts what a mask holds, 2.15 fills by it.
    """
    function = subject.forward if isinstance(subject, nn.Module) else subject
    lines, first = inspect.getsourcelines(function)
    found, possible = set(), set()
    for number, text in enumerate(lines, first):
        comment = re.search(r"# expect: (.*)", text)
        for part in comment.group(1).split(";") if comment else ():
            rule, severity, *target = part.split()
            (possible if rule.startswith("?") else found).add((number, rule.lstrip("?"), severity, " ".join(target)))
    return found, possible


def cases(prefix):
    for name, value in globals().items():
        if name.lower().startswith(prefix) and name != "PlantedBackward":
            yield pytest.param(value() if isinstance(value, type) else value, id=name)


def arguments(subject):
    if isinstance(subject, CleanModule):
        return (torch.randn(2, 5, 6),), {}
    function = subject.forward if isinstance(subject, nn.Module) else subject
    names = list(inspect.signature(function).parameters)
    if names[0] == "inputs":
        return ({"maps": [x.clone()]},), {"extra": x.clone()}
    if names[0] == "n":
        return (torch.arange(6),), {}
    return ((x.clone(), 2) if "k" in names else (x.clone(),)), {}


@pytest.mark.parametrize("subject", cases("planted"))
def test_every_planted_fault_is_found_on_its_line_and_nothing_else(subject):
    args, kwargs = arguments(subject)
    report = check(subject, *args, only=("writes",), **kwargs)
    found = {(f.line, f.rule, f.severity, f.target) for f in report.findings}
    wanted, possible = expected(subject)
    assert found - possible == wanted, str(report)
    assert {f.file for f in report.findings} == {__file__}
    assert report.ok == all(severity != "error" for _, _, severity, _ in wanted)


@pytest.mark.parametrize("subject", cases("clean"))
def test_clean_code_comes_out_clean(subject):
    args, kwargs = arguments(subject)
    report = check(subject, *args, only=("writes",), **kwargs)
    assert report.clean, str(report)


@pytest.mark.parametrize("require_grad", [False, True])
@pytest.mark.parametrize(
    "subject", [planted_input, planted_view, planted_saved, planted_mask], ids=lambda s: s.__name__
)
def test_a_write_is_found_whether_or_not_the_input_requires_a_gradient(subject, require_grad):
    report = check(subject, x.clone().requires_grad_(require_grad), only=("writes",))
    assert {(f.line, f.rule, f.severity) for f in report.findings} >= {entry[:3] for entry in expected(subject)[0]}


def test_a_store_over_several_lines_is_found_where_its_statement_stands():
    _, first = inspect.getsourcelines(stored_over_lines)
    report = check(stored_over_lines, x, only=("writes",))
    assert [f.rule for f in report.findings] == ["DP002"]
    assert first + 2 <= report.findings[0].line <= first + 4


def test_writes_name_the_argument_the_shape_and_the_dtype():
    def shifted(first, second):
        second[0] = 1.0
        return first + second

    (finding,) = check(shifted, torch.zeros(3), torch.zeros(3), only=("writes",)).findings
    assert (finding.name, finding.shape, finding.dtype) == ("second", (), "float32")
    report = check(PlantedBuffer(), x, only=("writes",))
    assert (report.findings[0].name, report.findings[0].shape) == ("seen", (3,))


def test_a_line_that_writes_in_a_loop_is_one_finding_with_a_count():
    def looped(x):
        y = x * 2
        for _ in range(4):
            y += 1
        return y

    (finding,) = check(looped, x, only=("writes",)).findings
    assert finding.count == 4


def test_a_write_by_a_custom_backward_is_left_to_backward_and_one_in_its_forward_is_found():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.mul_(2)

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2

    report = check(lambda x: Doubled.apply(x), x, only=("writes",))
    assert any(f.rule == "DP003" and "input" in f.target for f in report.findings), str(report)


def test_captured_tensors_and_modules_are_named_and_left_as_they_were():
    counter, layer = torch.zeros(2), nn.BatchNorm1d(3)

    def counted(x):
        counter.add_(1)
        return layer(x) + counter.sum()

    report = check(counted, x, only=("writes",))
    targets = {(f.target, f.name) for f in report.findings}
    assert ("captured tensor", "counter") in targets
    assert ("buffer", "layer.running_mean") in targets
    assert counter.tolist() == [0.0, 0.0]
    assert layer.num_batches_tracked.item() == 0


def test_a_comment_allows_a_rule_on_its_line_alone():
    def allowed(x):
        x += 1  # detpost: allow DP001
        x -= 1
        return x

    report = check(allowed, x, only=("writes",))
    assert [f.source for f in report.findings] == ["x -= 1"]
