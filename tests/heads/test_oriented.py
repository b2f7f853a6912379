from __future__ import annotations

import math

import pytest
import torch

from detpost import DetectionPostProcessor, Detections
from detpost.heads import OrientedBoxes
from tests.mixin import assert_same, one_line
from tests.test_nms import exported

SIZES = torch.tensor([[100, 200], [37, 23]])


def sample(threshold=None, batch=2, dtype=torch.float32, boxes=None):
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=6, score_threshold=threshold)
    boxes = torch.rand(batch, 7, 5) * 0.5 + 0.1 if boxes is None else boxes
    logits = torch.randn(batch, boxes.shape[1], 2)
    return post(logits.to(dtype), boxes[..., :4].to(dtype), torch.full((batch, 2), 50)), boxes.to(dtype)


def one(box, size, **arguments):
    """Decode one box in one image of (height, width)."""
    found, boxes = sample(batch=1, boxes=torch.tensor([[box]]))
    result = OrientedBoxes(**arguments)(found, boxes, torch.tensor([size]))
    return tuple(value[0, 0] for value in result)


def test_an_angle_turns_the_box_clockwise_on_the_screen():
    _, corners, enclosing = one([0.5, 0.5, 0.4, 0.1, math.pi / 6], (100, 100))
    cosine, sine = math.cos(math.pi / 6), math.sin(math.pi / 6)
    first = torch.tensor([50 - 20 * cosine + 5 * sine, 50 - 20 * sine - 5 * cosine])
    torch.testing.assert_close(corners[0], first, rtol=0, atol=1e-4)
    along = corners[1] - corners[0]  # the width: to the right and down
    torch.testing.assert_close(along, torch.tensor([40 * cosine, 40 * sine]), rtol=0, atol=1e-4)
    assert_same(enclosing, torch.cat((corners.amin(0), corners.amax(0))))


def test_at_angle_zero_the_box_is_the_upright_one():
    boxes, corners, enclosing = one([0.5, 0.25, 0.2, 0.1, 0.0], (100, 200))
    assert_same(boxes, torch.tensor([100.0, 25.0, 40.0, 10.0, 0.0]))
    assert corners.tolist() == [[80.0, 20.0], [120.0, 20.0], [120.0, 30.0], [80.0, 30.0]]
    assert enclosing.tolist() == [80.0, 20.0, 120.0, 30.0]


def test_sides_scale_along_the_box_and_the_angle_stays():
    """A standing box keeps its width times the image's width, as the heads of the field have it."""
    boxes, _, enclosing = one([0.5, 0.5, 0.2, 0.1, math.pi / 2 - 1e-7], (100, 200))
    torch.testing.assert_close(boxes[2:4], torch.tensor([40.0, 10.0]))
    torch.testing.assert_close(enclosing, torch.tensor([95.0, 30.0, 105.0, 70.0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("turns", [-3, -1, 0, 1, 2, 7])
@pytest.mark.parametrize("angle", [-1.5, -0.3, 0.0, 0.8, 1.5])
def test_any_angle_comes_back_within_half_a_turn(angle, turns):
    boxes, corners, _ = one([0.5, 0.5, 0.2, 0.1, angle + turns * math.pi], (100, 100))
    torch.testing.assert_close(boxes[4], torch.tensor(angle), rtol=0, atol=1e-5)
    torch.testing.assert_close(corners, one([0.5, 0.5, 0.2, 0.1, angle], (100, 100))[1], rtol=0, atol=1e-3)


def test_an_angle_in_range_keeps_its_bits():
    angles = torch.linspace(-math.pi / 2 + 1e-6, math.pi / 2 - 1e-6, 101)
    boxes = torch.cat((torch.full((1, 101, 4), 0.3), angles.view(1, 101, 1)), -1)
    post = DetectionPostProcessor.from_preset("rtdetr")
    found = post(torch.randn(1, 101, 1), boxes[..., :4])
    assert_same(OrientedBoxes()(found, boxes).boxes, boxes[:, found.queries[0]])


def test_an_angle_of_half_turns_is_scaled():
    torch.testing.assert_close(one([0.5, 0.5, 0.2, 0.1, 0.25], (9, 9), angle_scale=math.pi)[0][4].item(), math.pi / 4)


def test_rows_are_gathered_by_query_and_zero_where_not_valid():
    found, boxes = sample(threshold=0.7)
    result = OrientedBoxes()(found, boxes, SIZES)
    assert 0 < found.valid.sum() < found.valid.numel()
    for image, (height, width) in enumerate(SIZES.tolist()):
        rows = boxes[image, found.queries[image, found.valid[image]]]
        factors = torch.tensor([width, height, width, height, 1.0])
        assert_same(result.boxes[image, found.valid[image]], rows * factors)
    for value in result:
        assert value[~found.valid].eq(0).all()


def test_the_same_sides_and_area_whatever_the_angle():
    found, boxes = sample()
    result = OrientedBoxes()(found, boxes * torch.tensor([1, 1, 1, 1, 9.0]), SIZES)
    sides = (result.corners - result.corners.roll(-1, dims=2)).norm(dim=-1)
    torch.testing.assert_close(sides[..., 0], result.boxes[..., 2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sides[..., 1], result.boxes[..., 3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.corners.mean(dim=2), result.boxes[..., :2], rtol=1e-4, atol=1e-4)


def test_compiles_and_exports():
    torch._dynamo.reset()
    head = OrientedBoxes()
    arguments = (*sample(threshold=0.7), SIZES)
    assert_same(torch.compile(head, fullgraph=True, backend="aot_eager")(*arguments), head(*arguments))
    program = torch.export.export(head, arguments)
    other = (*sample(threshold=0.7), SIZES + 3)
    assert_same(program.module()(*other), head(*other))


def test_runs_in_onnx_runtime():
    class Module(torch.nn.Module):
        def forward(self, queries, valid, boxes, sizes):
            return OrientedBoxes()(Detections(boxes, queries, boxes, queries, valid), boxes, sizes)

    def arguments(batch):
        found, boxes = sample(threshold=0.7, batch=batch)
        return found.queries, found.valid, boxes, torch.full((batch, 2), 50)

    _, session = exported(Module(), arguments(2), ["boxes", "corners", "enclosing"])
    other = arguments(3)
    for got, expected in zip(session(*other), Module()(*other), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_gradcheck():
    found, boxes = sample(threshold=0.7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda values: tuple(OrientedBoxes()(found, values, SIZES)), boxes.requires_grad_())


def test_is_pure(purity):
    purity(OrientedBoxes(), *sample(), SIZES)


@pytest.mark.parametrize(
    ("values", "kind", "pattern"),
    [
        (torch.zeros(2, 7, 4), ValueError, r"oriented_boxes must have shape \(B, Q, 5\); got \(2, 7, 4\)"),
        (torch.zeros(2, 35), ValueError, r"got \(2, 35\)"),
        (torch.zeros(2, 7, 5).int(), TypeError, "oriented_boxes must be a floating tensor"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(values, kind, pattern):
    with pytest.raises(kind, match=pattern) as error:
        OrientedBoxes()(sample()[0], values, SIZES)
    one_line(error)


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(scale):
    with pytest.raises(ValueError, match="angle_scale must be a number other than 0"):
        OrientedBoxes(scale)
