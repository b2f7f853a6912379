from __future__ import annotations

import itertools

import pytest
import torch
import torchvision

from detpost import boxes
from tests.mixin import OperatorTests, assert_same, one_line

FORMATS = ("xyxy", "xywh", "cxcywh")
PAIRS = list(itertools.product(FORMATS, FORMATS))
FUNCTIONS = {
    "convert": lambda b: boxes.convert(b, "cxcywh", "xyxy"),
    "convert to the same": lambda b: boxes.convert(b, "xyxy", "xyxy"),
    "scale": lambda b: boxes.scale(b, (30, 50)),
    "clip": lambda b: boxes.clip(b, (30, 50)),
    "hflip": lambda b: boxes.hflip(b, 50),
    "vflip": lambda b: boxes.vflip(b, 30),
    "transform": lambda b: boxes.transform(b, torch.eye(3, dtype=b.dtype)),
    "unletterbox": lambda b: boxes.unletterbox(b, (30, 50), (64, 64)),
}


def corners(*leading: int, dtype: torch.dtype = torch.float32, extent: float = 40.0) -> torch.Tensor:
    """Ordered xyxy boxes well inside [0, extent]."""
    low = extent * (0.05 + 0.4 * torch.rand(*leading, 2, dtype=torch.float64))
    return torch.cat((low, low + extent * (0.05 + 0.4 * torch.rand(*leading, 2, dtype=torch.float64))), -1).to(dtype)


def box_exceptions(*rest):
    """What every function says about boxes that are none."""
    return [
        ((torch.zeros(2, 3), *rest), ValueError, r"\(\.\.\., 4\); got \(2, 3\)"),
        ((torch.tensor(1.0), *rest), ValueError, r"\(\.\.\., 4\); got \(\)"),
        ((torch.zeros(2, 4, dtype=torch.int64), *rest), TypeError, "floating.*int64"),
        (([1.0, 2.0, 3.0, 4.0], *rest), TypeError, "floating.*list"),
    ]


def size_exceptions(build):
    """What every function says about image sizes that do not fit boxes of shape (2, 3, 4)."""
    wrong_prefix = [torch.ones(3, 2), torch.ones(2, 4, 2), torch.ones(2, 3, 1, 2), torch.ones(1, 1, 1, 2)]
    return [
        *((build(sizes), ValueError, "prefix") for sizes in wrong_prefix),
        (build(torch.ones(2, 4)), ValueError, r"\(height, width\).*got \(2, 4\)"),
        (build(torch.tensor(3.0)), ValueError, r"\(height, width\).*got \(\)"),
        (build(torch.ones(2, 2, dtype=torch.bool)), TypeError, "bool"),
        (build(torch.ones(2, 2, dtype=torch.complex64)), TypeError, "complex"),
        (build(torch.ones(2, 2, device="meta")), ValueError, r"on meta and boxes on cpu"),
        (build(7), TypeError, "pair"),
        (build((1, 2, 3)), TypeError, "pair"),
        (build("hw"), TypeError, "pair"),
        (build(("1", 2)), TypeError, "height must be a number"),
        (build((1, None)), TypeError, "width must be a number"),
    ]


def extent_exceptions(name):
    base = corners(2, 3)
    return [
        ((base, torch.ones(3)), ValueError, f"{name}.*prefix"),
        ((base, torch.ones(2, 3, 4)), ValueError, f"{name}.*prefix"),
        ((base, torch.ones(2, device="meta")), ValueError, f"{name} is on meta"),
        ((base, "40"), TypeError, f"{name} must be a number"),
        ((base, None), TypeError, f"{name} must be a number"),
        *box_exceptions(5.0),
    ]


LEADING = [(), (0,), (1,), (5,), (2, 3), (0, 3), (2, 0), (2, 1, 3)]


class TestConvert(OperatorTests):
    operator = staticmethod(boxes.convert)

    def arguments(self, dtype):
        return corners(2, 3, dtype=dtype), "xyxy", "cxcywh"

    def cardinalities(self):
        return [
            ((torch.rand(*shape, 4), src, dst), (*shape, 4)) for shape, (src, dst) in itertools.product(LEADING, PAIRS)
        ]

    def features(self):
        same = {"xyxy": [10.0, 20, 30, 60], "xywh": [10.0, 20, 20, 40], "cxcywh": [20.0, 40, 20, 40]}
        return [((torch.tensor(same[src]), src, dst), torch.tensor(same[dst])) for src, dst in PAIRS]

    def exceptions(self):
        base = corners(2)
        return [
            ((base, "xyxyxy", "xywh"), ValueError, "src must be one of.*'xyxyxy'"),
            ((base, "xyxy", "XYWH"), ValueError, "dst must be one of.*'XYWH'"),
            ((base, None, "xywh"), ValueError, "src must be one of"),
            *box_exceptions("xyxy", "xywh"),
            *box_exceptions("xyxy", "xyxy"),
        ]

    @pytest.mark.parametrize(("src", "dst"), PAIRS)
    def test_agrees_with_torchvision(self, src, dst):
        values = boxes.convert(corners(7, 5), "xyxy", src)
        torch.testing.assert_close(boxes.convert(values, src, dst), torchvision.ops.box_convert(values, src, dst))

    @pytest.mark.parametrize(("src", "dst"), PAIRS)
    def test_round_trip_gives_the_boxes_back(self, src, dst):
        values = boxes.convert(corners(50, dtype=torch.float64), "xyxy", src)
        back = boxes.convert(boxes.convert(values, src, dst), dst, src)
        torch.testing.assert_close(back, values, rtol=1e-13, atol=1e-13)

    @pytest.mark.parametrize(("src", "dst"), PAIRS)
    def test_gradcheck_of_every_route(self, src, dst):
        values = corners(3, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda b: boxes.convert(b, src, dst), values)


class TestScale(OperatorTests):
    operator = staticmethod(boxes.scale)

    def arguments(self, dtype):
        return corners(2, 3, dtype=dtype, extent=1.0), torch.tensor([[30.0, 50.0], [7.0, 11.0]], dtype=dtype)

    def cardinalities(self):
        return [((torch.rand(*shape, 4), sizes), (*shape, 4)) for shape in LEADING for sizes in sizes_for(shape)]

    def features(self):
        unit = torch.tensor([0.5, 0.25, 1.0, 0.75])
        per_image = torch.tensor([[100, 200], [400, 40]])
        return [
            ((unit, (100, 200)), torch.tensor([100.0, 25, 200, 75])),
            ((unit, [100, 200]), torch.tensor([100.0, 25, 200, 75])),
            ((unit, torch.tensor([100, 200])), torch.tensor([100.0, 25, 200, 75])),
            ((unit.expand(2, 1, 4), per_image), torch.tensor([[[100.0, 25, 200, 75]], [[20.0, 100, 40, 300]]])),
            ((unit.expand(2, 4), per_image), torch.tensor([[100.0, 25, 200, 75], [20.0, 100, 40, 300]])),
            ((unit, torch.tensor([0.5, 2.0])), torch.tensor([1.0, 0.125, 2.0, 0.375])),
            ((unit, (torch.tensor(100), 200)), torch.tensor([100.0, 25, 200, 75])),
            ((unit.expand(1, 1, 4), (torch.tensor(100), 200)), torch.tensor([[[100.0, 25, 200, 75]]])),
        ]

    def exceptions(self):
        return [*size_exceptions(lambda sizes: (torch.rand(2, 3, 4), sizes)), *box_exceptions((3, 4))]

    def test_a_square_batch_of_boxes_is_not_scaled_by_the_wrong_axis(self):
        # B == Q: sizes (B, 2) belong to the first axis, never to the one beside the coordinates.
        sizes = torch.tensor([[10, 10], [100, 100]])
        scaled = boxes.scale(torch.ones(2, 2, 4), sizes)
        assert_same(scaled, torch.tensor([10.0, 100.0]).reshape(2, 1, 1).expand(2, 2, 4))


class TestClip(OperatorTests):
    operator = staticmethod(boxes.clip)

    def arguments(self, dtype):
        far = corners(2, 3, dtype=dtype) - torch.tensor([15.0, 10.0, 0.0, 0.0], dtype=dtype)
        return far, torch.tensor([[30.5, 20.25], [17.75, 31.5]], dtype=dtype)

    def cardinalities(self):
        return [((torch.rand(*shape, 4), sizes), (*shape, 4)) for shape in LEADING for sizes in sizes_for(shape)]

    def features(self):
        wild = torch.tensor([[-5.0, -6.0, 300.0, 400.0], [250.0, 90.0, 260.0, 99.0], [3.0, 4.0, 5.0, 6.0]])
        clipped = torch.tensor([[0.0, 0.0, 200.0, 80.0], [200.0, 80.0, 200.0, 80.0], [3.0, 4.0, 5.0, 6.0]])
        two = torch.tensor([[80, 200], [2, 4]])
        second = torch.tensor([[0.0, 0.0, 4.0, 2.0], [4.0, 2.0, 4.0, 2.0], [3.0, 2.0, 4.0, 2.0]])
        return [
            ((wild, (80, 200)), clipped),
            ((wild, torch.tensor([80, 200])), clipped),
            ((wild.expand(2, 3, 4), two), torch.stack((clipped, second))),
            ((torch.tensor([-torch.inf, -torch.inf, torch.inf, torch.inf]), (2, 3)), torch.tensor([0.0, 0, 3, 2])),
        ]

    def exceptions(self):
        return [*size_exceptions(lambda sizes: (torch.rand(2, 3, 4), sizes)), *box_exceptions((3, 4))]

    def test_agrees_with_torchvision(self):
        values = 80 * torch.randn(100, 4)
        assert_same(boxes.clip(values, (50, 70)), torchvision.ops.clip_boxes_to_image(values, (50, 70)))


class TestHflip(OperatorTests):
    operator = staticmethod(boxes.hflip)

    def arguments(self, dtype):
        return corners(2, 3, dtype=dtype), torch.tensor([50.0, 70.0], dtype=dtype)

    def cardinalities(self):
        return [((torch.rand(*shape, 4), width), (*shape, 4)) for shape in LEADING for width in extents_for(shape)]

    def features(self):
        return [
            ((torch.tensor([10.0, 20, 30, 40]), 100), torch.tensor([70.0, 20, 90, 40])),
            ((torch.tensor([10.0, 20, 30, 40]), 35.5), torch.tensor([5.5, 20, 25.5, 40])),
            ((torch.tensor([[[10.0, 20, 30, 40]]] * 2), torch.tensor([100, 50])),
             torch.tensor([[[70.0, 20, 90, 40]], [[20.0, 20, 40, 40]]])),
            ((torch.tensor([30.0, 20, 10, 40]), 100), torch.tensor([70.0, 20, 90, 40])),
        ]  # fmt: skip

    def exceptions(self):
        return extent_exceptions("width")

    def test_moves_boxes_as_the_image_moves(self):
        image = torch.zeros(20, 30)
        image[4:9, 3:11] = 1
        assert_same(boxes.hflip(drawn(image), 30), drawn(image.flip(1)))
        assert_same(boxes.vflip(drawn(image), 20), drawn(image.flip(0)))

    @pytest.mark.parametrize("flip", [boxes.hflip, boxes.vflip])
    def test_twice_is_nothing(self, flip):
        values = corners(20).round()
        assert_same(flip(flip(values, 50), 50), values)


class TestVflip(OperatorTests):
    operator = staticmethod(boxes.vflip)

    def arguments(self, dtype):
        return corners(2, 3, dtype=dtype), torch.tensor([50.0, 70.0], dtype=dtype)

    def cardinalities(self):
        return [((torch.rand(*shape, 4), height), (*shape, 4)) for shape in LEADING for height in extents_for(shape)]

    def features(self):
        return [
            ((torch.tensor([10.0, 20, 30, 40]), 100), torch.tensor([10.0, 60, 30, 80])),
            ((torch.tensor([[[10.0, 20, 30, 40]]] * 2), torch.tensor([100, 50])),
             torch.tensor([[[10.0, 60, 30, 80]], [[10.0, 10, 30, 30]]])),
            ((torch.tensor([10.0, 40, 30, 20]), 100), torch.tensor([10.0, 60, 30, 80])),
        ]  # fmt: skip

    def exceptions(self):
        return extent_exceptions("height")


MIRROR = torch.tensor([[-1.0, 0.0, 100.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
QUARTER_TURN = torch.tensor([[0.0, -1.0, 50.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
HOMOGRAPHY = torch.tensor([[1.1, 0.1, 3.0], [-0.2, 0.9, 5.0], [1e-3, 2e-3, 1.0]])


class TestTransform(OperatorTests):
    operator = staticmethod(boxes.transform)

    def arguments(self, dtype):
        return corners(2, 3, dtype=dtype), HOMOGRAPHY.to(dtype)

    def cardinalities(self):
        return [
            ((torch.rand(*shape, 4), matrix), (*shape, 4))
            for shape in LEADING
            for matrix in (HOMOGRAPHY, *(HOMOGRAPHY.expand(*shape[:n], 3, 3) for n in range(1, len(shape) + 1)))
        ]

    def features(self):
        box = torch.tensor([10.0, 20.0, 30.0, 60.0])
        shift = torch.tensor([[1.0, 0.0, 5.0], [0.0, 1.0, -7.0], [0.0, 0.0, 1.0]])
        shear = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        halve = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
        tilt = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.1, 0.0, 1.0]])
        negated = torch.tensor([15.0, 13.0, 35.0, 53.0])
        return [
            ((box, torch.eye(3)), box),
            ((box, shift), torch.tensor([15.0, 13, 35, 53])),
            ((box, MIRROR), torch.tensor([70.0, 20, 90, 60])),
            ((box, QUARTER_TURN), torch.tensor([-10.0, 10, 30, 30])),
            ((box, shear), torch.tensor([30.0, 20, 90, 60])),
            ((box, halve), torch.tensor([5.0, 10, 15, 30])),
            ((box, tilt), torch.tensor([10 / 2, 20 / 4, 30 / 4, 60 / 2])),
            ((box, -shift), negated),  # a homography has no sign
            ((box.expand(2, 1, 4), torch.stack((torch.eye(3), MIRROR))),
             torch.tensor([[[10.0, 20, 30, 60]], [[70.0, 20, 90, 60]]])),
            ((box, torch.eye(3, dtype=torch.float64)), box),
        ]  # fmt: skip

    def exceptions(self):
        base = corners(2, 3)
        return [
            ((base, [[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]), TypeError, "matrix must be a floating tensor.*list"),
            ((base, torch.eye(3, dtype=torch.int64)), TypeError, "matrix must be a floating tensor.*int64"),
            ((base, torch.ones(2, 3)), ValueError, r"\(\.\.\., 3, 3\); got \(2, 3\).*row \(0, 0, 1\)"),
            ((base, torch.ones(3)), ValueError, r"got \(3,\)"),
            ((base, torch.ones(3, 3, 3)), ValueError, "prefix"),
            ((base, torch.ones(2, 3, 1, 3, 3)), ValueError, "prefix"),
            ((base, torch.ones(3, 3, device="meta")), ValueError, "matrix is on meta"),
            *box_exceptions(torch.eye(3)),
        ]

    def test_a_flip_matrix_gives_ordered_boxes(self):
        # kornia once answered this case with the warning "incorrect box coordinates if a flip transformation
        # performed on boxes": carrying two corners alone turns them around.
        values = corners(10)
        first = torch.cat((values[:, :2], torch.ones(10, 1)), -1) @ MIRROR.T
        second = torch.cat((values[:, 2:], torch.ones(10, 1)), -1) @ MIRROR.T
        assert (first[:, 0] > second[:, 0]).all(), "the naive way is expected to give x1 > x2"
        flipped = boxes.transform(values, MIRROR)
        assert (flipped[:, :2] <= flipped[:, 2:]).all()
        torch.testing.assert_close(flipped, boxes.hflip(values, 100))

    def test_carries_the_boxes_of_drawn_shapes(self):
        image = torch.zeros(20, 30)
        image[4:9, 3:11] = 1
        turned = torch.tensor([[0.0, -1.0, 20.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # clockwise, height 20
        assert_same(boxes.transform(drawn(image), turned), drawn(image.rot90(-1)))

    def test_gradcheck_in_the_matrix_of_each_image(self):
        values = corners(2, 3, dtype=torch.float64).requires_grad_()
        matrices = torch.stack((HOMOGRAPHY, HOMOGRAPHY + 0.01)).double().requires_grad_()
        assert torch.autograd.gradcheck(boxes.transform, (values, matrices))


class TestUnletterbox(OperatorTests):
    operator = staticmethod(boxes.unletterbox)

    def arguments(self, dtype):
        return corners(2, 3, dtype=dtype), torch.tensor([[30.0, 50.0], [70.0, 11.0]], dtype=dtype), (64, 48)

    def cardinalities(self):
        return [
            ((torch.rand(*shape, 4), sizes, (64, 64)), (*shape, 4)) for shape in LEADING for sizes in sizes_for(shape)
        ]

    def features(self):
        tall, wide = (1280, 640), (320, 640)
        whole_wide = torch.tensor([0.0, 160.0, 640.0, 480.0])
        return [
            ((torch.tensor([160.0, 0, 480, 640]), tall, (640, 640)), torch.tensor([0.0, 0, 640, 1280])),
            ((torch.tensor([0.0, 0, 320, 640]), tall, (640, 640), False), torch.tensor([0.0, 0, 640, 1280])),
            ((whole_wide, wide, (640, 640)), torch.tensor([0.0, 0, 640, 320])),
            ((torch.stack((torch.tensor([160.0, 0, 480, 640]), whole_wide)), torch.tensor([tall, wide]), (640, 640)),
             torch.tensor([[0.0, 0, 640, 1280], [0.0, 0, 640, 320]])),
            ((whole_wide, wide, torch.tensor([640, 640])), torch.tensor([0.0, 0, 640, 320])),
        ]  # fmt: skip

    def exceptions(self):
        base = torch.rand(2, 3, 4)
        return [
            *size_exceptions(lambda sizes: (base, sizes, (64, 64))),
            *size_exceptions(lambda sizes: (base, (64, 64), sizes)),
            *box_exceptions((3, 4), (5, 6)),
        ]

    @pytest.mark.parametrize("centered", [True, False])
    def test_undoes_a_letterbox(self, centered):
        original = corners(50, dtype=torch.float64)
        height, width, target = 37.0, 53.0, (64.0, 48.0)
        ratio = min(target[0] / height, target[1] / width)
        pad = torch.tensor([target[1] - width * ratio, target[0] - height * ratio]) * (0.5 if centered else 0.0)
        boxed = original * ratio + pad.repeat(2)
        torch.testing.assert_close(boxes.unletterbox(boxed, (height, width), target, centered), original)


def sizes_for(shape):
    """Every image size that fits boxes of this leading shape."""
    return [(3, 4), torch.rand(2), *(torch.rand(*shape[:n], 2) for n in range(1, len(shape) + 1))]


def extents_for(shape):
    return [3, 2.5, torch.tensor(7), *(torch.rand(*shape[:n]) for n in range(1, len(shape) + 1))]


def drawn(image):
    """The box of what is drawn in an image (H, W): pixel i covers [i, i + 1)."""
    rows, columns = image.any(1).nonzero(), image.any(0).nonzero()
    return torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], dtype=torch.float32)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_result_never_shares_memory_with_its_input(name):
    values = corners(3)
    before = values.clone()
    FUNCTIONS[name](values).zero_()
    assert_same(values, before)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_strides_give_the_same_boxes(name):
    values = corners(5, 3)
    strided = torch.stack((values, values + 1), dim=-1).transpose(0, 1)[..., 0]
    assert not strided.is_contiguous()
    assert_same(FUNCTIONS[name](strided), FUNCTIONS[name](values.transpose(0, 1).contiguous()))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_meta_boxes_need_no_values(name):
    if name == "transform":
        result = boxes.transform(torch.rand(2, 3, 4, device="meta"), torch.eye(3, device="meta"))
    else:
        result = FUNCTIONS[name](torch.rand(2, 3, 4, device="meta"))
    assert result.is_meta
    assert result.shape == (2, 3, 4)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_dynamic_batches_export(name):
    class Wrapped(torch.nn.Module):
        def forward(self, values):
            return FUNCTIONS[name](values)

    program = torch.export.export(Wrapped(), (corners(2, 3),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    values = corners(5, 3)
    assert_same(program.module()(values), FUNCTIONS[name](values))


def test_an_error_shows_the_shape_that_came():
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(2, 5, 4\)") as error:
        boxes.scale(torch.rand(2, 5, 4), torch.ones(3, 2))
    assert "prefix of (2, 5)" in one_line(error)
