"""Plain calls go to C++ in one step, and give what every other call gives."""

import copy
import functools
import gc
import itertools
import math
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch

from detpost import DecodeSpec, DetectionPostProcessor, Detections, presets, tensors
from detpost.integrations import kornia, rfdetr, rtdetr, ultralytics
from detpost.integrations.transformers import post_process_object_detection
from detpost.kernels import direct

pytestmark = pytest.mark.skipif(
    direct._extension() is None, reason="no C++ compiler, or a PyTorch or Python that the extension does not serve"
)

GENERATOR = torch.Generator().manual_seed(4)
LOGITS = torch.randn(3, 20, 7, generator=GENERATOR) * 3
BOXES = torch.rand(3, 20, 4, generator=GENERATOR) * 1.4 - 0.2
SIZES = torch.tensor([[480, 640], [33, 1000], [7, 5]])


@pytest.fixture
def without(monkeypatch):
    """Give a function that makes a call without the extension."""

    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(direct, "_extension", lambda: None)
            patch.setattr(tensors, "extension", lambda: None)
            return function()

    return call


@pytest.fixture
def direct_calls(monkeypatch):
    """Count the calls that the extension took."""
    taken = []
    real = direct._extension()

    def counted(name):
        def call(*arguments):
            found = getattr(real, name)(*arguments)
            taken.extend([name] if found is not None else [])
            return found

        return call

    stand_in = SimpleNamespace(**{name: counted(name) for name in ("decode", "per_image", "selected")})
    monkeypatch.setattr(direct, "_extension", lambda: stand_in)
    return taken


def same(one, other):
    """Tell whether two results are equal: types, shapes, dtypes, NaN as NaN."""
    if isinstance(one, torch.Tensor):
        alike = one.shape == other.shape and one.dtype == other.dtype and one.stride() == other.stride()
        return alike and torch.equal(one.nan_to_num(nan=-7.5), other.nan_to_num(nan=-7.5))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))


def odd(values):
    """Sprinkle NaN, infinities and ties over values."""
    places = torch.arange(values.numel()).reshape(values.shape)
    values = torch.where(places % 11 == 3, math.nan, values)
    values = torch.where(places % 17 == 5, math.inf, values)
    return torch.where(places % 3 == 0, values.round(), values)


@pytest.mark.parametrize("name", presets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("background", ["none", "first", "last"])
def test_a_plain_call_gives_what_the_others_give(name, dtype, background, without, direct_calls):
    logits = odd(LOGITS).to(dtype)
    for threshold, sizes in itertools.product((None, 0.0, 0.3), (None, SIZES, SIZES.int(), SIZES.float() + 0.25)):
        post = DetectionPostProcessor.from_preset(name, top_k=13, score_threshold=threshold, background=background)
        raw = logits, BOXES, sizes
        padded = without(functools.partial(post, *raw))
        lists = without(padded.to_list)
        assert same(post(*raw), padded)
        assert same(post(*raw).to_list(), lists)
        assert same(post.per_image(*raw), lists)
    assert set(direct_calls) == {"decode", "per_image"}


@pytest.mark.parametrize("values", [LOGITS, odd(LOGITS)], ids=["numbers", "with NaN"])
def test_drop_ins_give_the_same_either_way(values, without, direct_calls):
    outputs = {"pred_logits": values, "pred_boxes": BOXES}
    pairs = [tuple(row) for row in SIZES.tolist()]
    scores = torch.cat((BOXES, values.sigmoid()), dim=-1)
    selected = torch.cat((scores, BOXES[..., :1].round()), dim=-1)[..., [0, 1, 2, 3, 4, -1]]
    calls = [
        *(
            lambda family=family, sizes=sizes, threshold=threshold: post_process_object_detection(
                SimpleNamespace(logits=values, pred_boxes=BOXES), threshold, sizes, family=family
            )
            for family in ("rt_detr", "detr", "deformable_detr", "owlvit", "rf_detr")
            for sizes in (SIZES, pairs)
            for threshold in (0.3, 0, -1, 0.9)
        ),
        lambda: kornia.DETRPostProcessor(0.3, 7, 30)(values, BOXES, SIZES),
        lambda: rtdetr.RTDETRPostProcessor(7, num_top_queries=30)(outputs, SIZES),
        lambda: rtdetr.RTDETRPostProcessor(7, num_top_queries=30).deploy()(outputs, SIZES),
        lambda: rtdetr.RTDETRPostProcessor(7, use_focal_loss=False, num_top_queries=30)(outputs, SIZES),
        lambda: rtdetr.RTDETRPostProcessor(7, use_focal_loss=False, num_top_queries=5)(outputs, SIZES),
        lambda: rfdetr.PostProcess(30)(outputs, SIZES),
        lambda: ultralytics.postprocess(scores, SIZES, 0.4),
        lambda: ultralytics.postprocess(scores, pairs, 0.4, max_det=3),
        *(
            lambda sizes=sizes, conf=conf, most=most: ultralytics.postprocess_selected(
                selected, sizes, conf, None, most
            )
            for sizes in (SIZES, SIZES.int(), SIZES.float() + 0.25, pairs)
            for conf in (0.4, 0, -1, 1.5)
            for most in (300, 3, 1, 0, -2, 10**30)
        ),
    ]
    for number, call in enumerate(calls):
        taken = len(direct_calls)
        assert same(call(), without(call)), number
        assert len(direct_calls) == taken + 1, number


def test_gradients_come_through_lists():
    logits, boxes = LOGITS.clone().requires_grad_(), BOXES.clone().requires_grad_()
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=9, score_threshold=0.3)
    for images in (post.per_image(logits, boxes, SIZES), post(logits, boxes, SIZES).to_list()):
        assert all(image["scores"].requires_grad and image["boxes"].requires_grad for image in images)
    with torch.no_grad():
        assert not post.per_image(logits, boxes, SIZES)[0]["scores"].requires_grad
    found = post(LOGITS, boxes, SIZES)  # of the boxes alone
    assert found.boxes.requires_grad
    assert found.to_list()[0]["boxes"].requires_grad


def test_derivatives_of_other_kinds_come_through():
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=9)
    _, tangent = torch.func.jvp(lambda boxes: post(LOGITS, boxes, SIZES).boxes, (BOXES,), (torch.ones_like(BOXES),))
    assert tangent.abs().sum() > 0
    slope = torch.func.grad(lambda boxes: post(LOGITS, boxes, SIZES).boxes.sum())(BOXES)
    assert slope.abs().sum() > 0
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(BOXES, torch.ones_like(BOXES))
        rows = post(LOGITS, dual, SIZES).to_list()[0]["boxes"]
        assert torch.autograd.forward_ad.unpack_dual(rows).tangent is not None


@pytest.mark.parametrize("kernel", ["numpy", "aten"])
def test_a_forced_kernel_is_asked(kernel, monkeypatch, direct_calls):
    post = DetectionPostProcessor.from_preset("rtdetr")
    monkeypatch.setenv("DETPOST_KERNEL", kernel)
    post(LOGITS, BOXES, SIZES)
    assert direct_calls == []
    monkeypatch.setenv("DETPOST_KERNEL", "native")
    post(LOGITS, BOXES, SIZES)
    monkeypatch.delenv("DETPOST_KERNEL")
    post(LOGITS, BOXES, SIZES)
    assert direct_calls == ["decode", "decode"]


class Watched(torch.Tensor):
    """A tensor of another kind."""


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(torch.rand(3, 5, 6).double(), id="float64"),
        pytest.param(torch.rand(3, 5, 6).half(), id="half"),
        pytest.param(torch.rand(3, 6, 5).mT, id="not contiguous"),
        pytest.param(torch.rand(3, 5, 6).requires_grad_(), id="with a gradient"),
    ],
)
def test_selected_rows_that_are_not_plain_go_another_way(rows, direct_calls):
    found = ultralytics.postprocess_selected(rows, SIZES, 0.5)
    assert direct_calls == []
    with torch.no_grad():
        plain = ultralytics.postprocess_selected(rows.detach().float().contiguous(), SIZES, 0.5)
    assert direct_calls == ["selected"]
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one.float(), other)
    assert found[0].requires_grad == rows.requires_grad


def test_no_selected_rows_give_none_back():
    assert [rows.shape for rows in ultralytics.postprocess_selected(torch.zeros(3, 0, 6), SIZES)] == [(0, 6)] * 3
    assert ultralytics.postprocess_selected(torch.zeros(0, 4, 6), []) == []
    assert ultralytics.postprocess_selected(torch.zeros(0, 4, 6), SIZES[:0]) == []


@pytest.mark.parametrize(
    "logits",
    [
        pytest.param(LOGITS.double(), id="float64"),
        pytest.param(LOGITS.mT.contiguous().mT, id="not contiguous"),
        pytest.param(LOGITS.as_subclass(Watched), id="a subclass"),
        pytest.param(torch.nn.Parameter(LOGITS), id="a parameter"),
    ],
)
def test_what_is_not_plain_goes_another_way(logits, direct_calls):
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=9)
    labels = post(logits, BOXES, SIZES).labels
    assert direct_calls == []
    assert labels.tolist() == post(LOGITS, BOXES, SIZES).labels.tolist()


def test_a_mode_sees_the_operators(direct_calls):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watcher(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Watcher():
        DetectionPostProcessor.from_preset("rtdetr")(LOGITS, BOXES, SIZES).to_list()
    assert seen
    assert direct_calls == []


def test_results_are_tensors_of_their_own():
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=9)
    first = post.per_image(LOGITS, BOXES, SIZES)[1]
    kept = {name: value.clone() for name, value in first.items()}
    scores = first["scores"]
    others = [post.per_image(LOGITS + number, BOXES, SIZES) for number in range(50)]
    assert same(first, kept)
    del first, others
    gc.collect()
    assert torch.equal(scores, kept["scores"])
    scores.add_(1.0)
    assert torch.equal(scores, kept["scores"] + 1)
    assert same(pickle.loads(pickle.dumps(kept)), kept)


def test_memory_is_given_back():
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=300)
    logits, boxes = torch.randn(8, 300, 80), torch.rand(8, 300, 4)

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    def run(times):
        for _ in range(times):
            post.per_image(logits, boxes)
            post(logits, boxes).to_list()

    run(100)
    before = resident()
    run(1000)  # 260 MB of results
    assert resident() - before < 20e6


def test_two_threads_may_call_at_once():
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=9)
    expected = post.per_image(LOGITS, BOXES, SIZES)
    wrong = []

    def work():
        wrong.extend(number for number in range(300) if not same(post.per_image(LOGITS, BOXES, SIZES), expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_another_spec_is_followed_and_copies_work():
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=9)
    assert post(LOGITS, BOXES).scores.shape == (3, 9)
    post.spec = DecodeSpec(top_k=4)
    assert post(LOGITS, BOXES).scores.shape == (3, 4)
    for other in (copy.deepcopy(post), pickle.loads(pickle.dumps(post))):
        assert same(other(LOGITS, BOXES), post(LOGITS, BOXES))


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("queries", [0, 2])
def test_nothing_in_gives_nothing_out(batch, queries):
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=9)
    images = post.per_image(torch.zeros(batch, queries, 3), torch.zeros(batch, queries, 4))
    assert [image["boxes"].shape for image in images] == [(min(9, queries * 3), 4)] * batch


def test_split_takes_slots_anywhere():
    valid = torch.tensor([[False, True, False, True], [False] * 4, [True] * 4])
    values = torch.arange(12).reshape(3, 4), torch.arange(36.0, dtype=torch.float64).reshape(3, 4, 3)
    images = tensors.split(None, valid, *values)
    assert same(images, [tuple(value[image][valid[image]] for value in values) for image in range(3)])
    found = Detections(values[0].float(), values[0], values[1][..., :1].expand(3, 4, 4).contiguous(), values[0], valid)
    assert [image["labels"].tolist() for image in found.to_list()] == [[1, 3], [], [8, 9, 10, 11]]
