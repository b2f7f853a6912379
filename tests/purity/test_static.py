"""The static half finds each fault on its line, leaves numbers, lists and arrays alone, and can be silenced."""

import re
import textwrap

import pytest

from detpost.purity import RULES, check_paths, check_source

HEADER = (
    "import math\nimport numpy as np\nimport torch\nimport torch.nn.functional as F\nfrom torch import Tensor, nn\n"
)

PLANTED = """
class Model(nn.Module):
    def __init__(self, n=3):
        super().__init__()
        self.n = 0
        self.act = nn.ReLU(inplace=True)  # DP005
        self.w = nn.Parameter(torch.zeros(3))
        self.register_buffer("b", torch.zeros(3))
        self.items = []
        nn.init.ones_(self.w)
        self.w.data.fill_(0)  # DP003 DP006

    def forward(self, x, k=2):
        self.n += 1
        x += 1  # DP001
        x[x > 0] = 0  # DP002
        k += 1
        y = x.view(-1)
        y *= 2  # DP001
        self.b += y.mean()  # DP001
        self.b[0] = 1  # DP002
        self.items[0] = y
        height, width = x.shape[-2:]
        height += 1
        for i in range(3):
            i += 1
        for i, part in enumerate([x, y]):
            i += 1
            part -= 1  # DP001
        total = 0
        for part in (x, y):
            total += part.sum()  # note DP001
        out = {}
        out["a"] = x
        out["a"] += 1
        parts = [x]
        parts[0] = y
        parts += [y]
        array = np.zeros(3)
        array[0] = 1
        array += 1
        array[array > 0] = 2
        F.relu(x, inplace=True)  # DP005
        torch.add(x, 1, out=y)  # DP004
        torch.add(x, 1, out=None)
        np.add(array, 1, out=array)
        x.data = y  # DP006
        x.add_(1)  # DP003
        torch.relu_(x)  # DP003
        nn.init.zeros_(x)  # DP003
        x.T[0] = 1  # DP002
        x @= y
        n = x.size(0)
        n -= 1
        text = "a"
        text += "b"
        z = x.sum().item()  # DP010
        z += 1
        values, indices = x.topk(2)
        values -= 1  # note DP001
        values.masked_fill_(values > 0, 1)  # note DP003
        x, self.c[..., 0] = y, 1  # DP002
        return x.requires_grad_()


def scale(boxes, factor):
    boxes[:, 0] *= factor  # DP001
    factor += 1
    return boxes


def count(n, total):
    n += 1
    total += n
    return total


def declared(a: Tensor, steps: int, names: list[str], maps: list[Tensor], rows: list[dict[str, Tensor]]) -> Tensor:
    a -= steps  # DP001
    steps += 1
    names += ["b"]
    names[0] = "x"
    maps[0] = a
    maps[0] += a  # DP001
    rows[0]["boxes"] = a
    rows[0][names[0]] = a
    return a


def optional(a: "torch.Tensor | None" = None, b: Tensor | None = None):
    if a is not None:
        a.clamp_(0)  # DP003
    if b is not None:
        b /= 2  # DP001


def inferred(q):
    r = declared(q, 1, [], [], [])
    r += 1  # DP001
    clamp = lambda t: t.clamp_(0)  # DP003
    m = (q > 0).float()
    m = m.softmax(-1)
    m[0] = 1  # DP002
    c = q.shape[0] * 2
    c //= 2
    e = q.new_zeros(2)
    e[1] += 2  # note DP001
    bits = 1
    bits <<= 2
    mean = math.sqrt(2)
    mean -= 1
    with torch.no_grad():
        for parameter in q.parameters():
            parameter.grad.zero_()  # DP003
            parameter -= 0.1 * parameter.grad  # DP001
    while bits > 0:
        bits -= 1
    return [row.squeeze_(0) for row in torch.unbind(e)]  # DP003


def branches(flag, size):
    if flag:
        value = 0
    else:
        value = torch.zeros(size)
    value += 1  # note DP001
    sizes = [0] * size
    sizes[0] += 1
    (first := torch.ones(2)).neg_()  # note DP003
    first[0], other = 1, 2  # note DP002
    return value, (other, sizes)
"""


FAULTS = """
class RoIHeads(nn.Module):
    def assign(self, proposals, gt_boxes, gt_labels):
        for proposals_in_image, gt_boxes_in_image, gt_labels_in_image in zip(proposals, gt_boxes, gt_labels):
            matched = self.matcher(gt_boxes_in_image, proposals_in_image)
            labels_per_image = gt_labels_in_image[matched.clamp(min=0)]
            labels_per_image = labels_per_image.to(dtype=torch.int64)
            idx = matched == self.matcher.BELOW
            labels_per_image[idx] = 0.0  # note DP002
            gt_labels_in_image[idx] = 0.0  # DP002


def waits(x, table, out: np.ndarray, keys: list[str]):
    scale = x.max().item()  # DP010
    scale = table.item()  # DP010
    scale = np.sum(keys).item()
    scale = out.item()
    scale = table.item("name")
    return scale


def shapes(x: Tensor, mask, out: np.ndarray):
    rows = x.nonzero()  # DP020
    rows = mask.nonzero(as_tuple=True)[0]  # DP020
    rows = torch.nonzero(x)  # DP020
    rows = torch.where(x > 0)[0]  # DP020
    rows = torch.where(x > 0, x, 0.0)
    rows = torch.masked_select(x, mask)  # DP020
    rows = x.unique()  # DP020
    rows = out.nonzero()
    rows = np.where(out > 0)
    rows = torch.count_nonzero(x)
    return rows


def temporaries(x: Tensor, rows):
    y = x * 2
    y += 1  # note DP001
    y[0] = 1  # note DP002
    y.view(-1).clamp_(0)  # note DP003
    torch.add(x, 1, out=y)  # note DP004
    y = x.view(-1)
    y += 1  # DP001
    y = x if rows else x.clone()
    y += 1  # DP001
    y = x.sigmoid()  # autograd saves the result
    y += 1  # DP001
    y = x[0]
    y += 1  # DP001
    y = x[x > 0]
    y += 1  # note DP001
    return y


class Block(nn.Module):
    def __init__(self, norm_layer):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.act = nn.ReLU()
        self.norm = norm_layer(3)
        self.given = partial(nn.SiLU, inplace=True)  # DP005

    def forward(self, x):
        out = self.conv(x)
        out += x  # note DP001
        out = self.act(out)
        out += x  # DP001
        out = self.norm(out)
        out += x  # DP001
        return out


def untold(x, y, z, boxes, logits):
    x += 1
    y[0] = 2
    z *= boxes
    logits[boxes] = 0
"""


def marked(source):
    return {
        (number, rule, "note" if note else "error")
        for number, line in enumerate(source.splitlines(), 1)
        for note, rule in re.findall(r"(note )?(DP\d{3})", line.partition("# ")[2])
    }


def found(source):
    return {(finding.line, finding.rule, finding.severity) for finding in check_source(source)}


def codes(source):
    return {finding.rule for finding in check_source(source)}


@pytest.mark.parametrize("planted", [PLANTED, FAULTS], ids=["writes", "faults"])
def test_every_planted_fault_is_found_with_its_severity_and_nothing_else(planted):
    source = HEADER + planted
    assert found(source) == marked(source)


def test_files_without_torch_are_never_flagged_for_plain_python():
    plain = "def f(x, n, table):\n    x += 1\n    n -= 1\n    table[0] = x\n    table[:, 0] = n\n    return x\n"
    assert found(plain) == set()


@pytest.mark.parametrize(
    "line",
    [
        "x += 1  # detpost: allow DP001",
        "x += 1  # kept on purpose  # detpost: allow DP002, DP001",
        "x.add_(1)  # detpost: allow DP003",
        "x[\n        0\n    ] = 1  # detpost: allow DP002",
        "x[0] = (  # detpost: allow DP002\n        1\n    )",
    ],
)
def test_a_comment_on_the_statement_silences_the_rules_it_names(line):
    source = f"{HEADER}\ndef f(x: Tensor):\n    {line}\n    return x\n"
    assert found(source) == set()
    other = source.replace("DP00", "DP09")
    assert len(found(other)) == 1


def test_a_comment_silences_its_own_line_alone_and_not_text_in_a_string():
    source = HEADER + textwrap.dedent(
        """
        def f(x: Tensor):
            x += 1  # detpost: allow DP001
            x += 2
            x += len("# detpost: allow DP001")
            for i in range(3):  # detpost: allow DP001
                x += 3
        """
    )
    assert [finding.source for finding in check_source(source)] == [
        "x += 2",
        'x += len("# detpost: allow DP001")',
        "x += 3",
    ]


def test_a_temporary_is_called_one_and_leaves_the_report_ok(tmp_path):
    (tmp_path / "module.py").write_text("import torch\ndef f(n):\n    x = torch.zeros(n)\n    x += 1\n    return x\n")
    (report,) = check_paths([tmp_path])
    assert (report.ok, report.clean) == (True, False)
    assert "a temporary of its own" in report.findings[0].message
    assert report.findings[0].target == "temporary"


def test_findings_say_why_and_what_to_write_instead():
    (finding,) = check_source(f"{HEADER}\ndef f(boxes: Tensor, shift):\n    boxes += shift\n    return boxes\n", "f.py")
    assert "boxes = boxes + shift" in finding.message
    assert (finding.file, finding.line, finding.source) == ("f.py", 8, "boxes += shift")
    assert all(rule.why and rule.rewrite and rule.code == code for code, rule in RULES.items())


def test_initialisation_of_parameters_is_left_alone_and_only_there():
    body = "class M(nn.Module):\n    def {}(self, x):\n        nn.init.zeros_(self.weight)\n"
    for name in ("__init__", "reset_parameters", "_init_weights"):
        assert found(HEADER + body.format(name)) == set()
    assert codes(HEADER + body.format("forward")) == {"DP003"}


def test_layers_handed_in_are_flagged_and_other_inplace_keywords_are_not():
    source = HEADER + "def f(act_layer, model, frame):\n    frame.drop(inplace=True)\n    fuse(model, inplace=True)\n"
    assert found(source) == set()
    assert codes(source + "    return act_layer(inplace=True)\n") == {"DP005"}


def test_folders_are_searched_and_hidden_ones_are_not(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / ".hidden").mkdir()
    for folder in ("package", ".hidden"):
        (tmp_path / folder / "module.py").write_text("import torch\ndef f(x: torch.Tensor):\n    x += 1\n")
    (report,) = check_paths([tmp_path])
    assert report.findings[0].line == 3
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        check_paths([tmp_path / "absent"])


@pytest.mark.parametrize(
    "source",
    [
        "",
        "x = 1",
        "match x:\n    case [1, *r]:\n        r[0] = 1\n",
        "async def f(x):\n    async for i in x:\n        i += 1\n",
    ],
)
def test_unusual_source_is_read_without_an_exception(source):
    assert check_source(source) == ()


def test_a_word_of_pythons_with_an_underscore_is_no_write_to_something_unknown():
    source = """
        import torch

        def kinds(pa, masks, x):
            masks.exp_()
            masks.pow_(2)
            x = torch.ones(2) if x is None else x.and_(x)
            return pa.list_(pa.int32()), pa.bool_(), masks.or_(1)
    """
    found = check_source(textwrap.dedent(source))
    assert [finding.line for finding in found] == [5, 6]
