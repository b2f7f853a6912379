"""kornia's DETRPostProcessor and ours, alone and inside the detector that its builder makes."""

from __future__ import annotations

import pytest
import torch

from detpost.integrations.kornia import DETRPostProcessor
from tests.integrations.references import SIZES, outputs
from tests.mixin import assert_same, one_line

post_processors = pytest.importorskip("kornia.models.rt_detr.post_processor")
pytestmark = pytest.mark.peers

SETTINGS = [
    {},
    {"confidence_threshold": 0.3},
    {"confidence_threshold": 0.9},
    {"confidence_threshold": 1.0},
    {"confidence_threshold": 1.5},
    {"confidence_threshold": -0.5},
    {"confidence_threshold": 0},
    {"confidence_threshold": 0.0, "filter_as_zero": True},
    {"confidence_threshold": 0.998, "filter_as_zero": True},
    {"filter_as_zero": True},
    {"confidence_filtering": False},
    {"confidence_threshold": 0.5, "confidence_filtering": False, "filter_as_zero": True},
]


def pair(**settings):
    settings = {"num_classes": 7, "num_top_queries": 50} | settings
    return DETRPostProcessor(**settings), post_processors.DETRPostProcessor(**settings)


def raw(**options):
    return tuple(outputs(**options).values())


def hold(ours, theirs):
    assert type(ours) is type(theirs)
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine.dtype == yours.dtype
        assert_same(mine[:, 0], yours[:, 0])
        torch.testing.assert_close(mine[:, 1], yours[:, 1], rtol=2e-6, atol=1e-7)
        assert_same(mine[:, 2:], yours[:, 2:])  # the same arithmetic in the same order


@pytest.mark.parametrize("sizes", [SIZES, SIZES.float()], ids=["int", "float"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_rows_are_kornias(settings, sizes):
    ours, theirs = pair(**settings)
    expected = theirs(*raw(), sizes)
    hold(ours(*raw(), sizes), expected)
    hold(DETRPostProcessor.like(theirs)(*raw(), sizes), expected)
    assert DETRPostProcessor.like(ours) is ours


def test_the_constructors_take_the_same_arguments_in_the_same_order():
    ours = DETRPostProcessor(0.998, 7, 50, True, True)
    hold(ours(*raw(), SIZES), post_processors.DETRPostProcessor(0.998, 7, 50, True, True)(*raw(), SIZES))
    assert list(DETRPostProcessor(0.3).state_dict()) == list(post_processors.DETRPostProcessor(0.3).state_dict()) == []


@pytest.fixture(scope="module")
def detector():
    from kornia.contrib.object_detection import RTDETRDetectorBuilder
    from kornia.models.rt_detr import RTDETRConfig

    torch.manual_seed(0)
    config = RTDETRConfig(
        "resnet18d", num_classes=7, input_size=64, head_num_queries=20, head_num_decoder_layers=1, head_hidden_dim=32
    )
    config.neck_hidden_dim, config.neck_dim_feedforward = 32, 64
    built = RTDETRDetectorBuilder.build(config=config, pretrained=False, confidence_threshold=0.0101)
    with torch.no_grad():
        for parameter in built.model.decoder.dec_score_head.parameters():  # spread the scores, which all start alike
            parameter.add_(torch.randn(parameter.shape) * 0.5)
    return built


@pytest.mark.parametrize("threshold", [0.0, 0.0101, 0.1])
def test_inside_the_detector_that_the_builder_makes(detector, threshold):
    theirs_post = detector.post_processor
    theirs_post.confidence_threshold = threshold
    images = [torch.rand(3, 50, 70), torch.rand(3, 64, 40)]
    theirs = detector(images)
    detector.post_processor = DETRPostProcessor.like(theirs_post)
    try:
        ours = detector(images)
        drawn = detector.visualize(images)
    finally:
        detector.post_processor = theirs_post
    assert sum(len(rows) for rows in theirs) > 5
    assert len(set(theirs[0][:, 1].tolist())) == len(theirs[0]), "a tie has no order there"
    hold(ours, theirs)
    assert [image.shape for image in drawn] == [image.shape for image in images]


def test_the_static_forms_compile_in_one_graph():
    for settings in ({"confidence_filtering": False}, {"confidence_threshold": 0.998, "filter_as_zero": True}):
        ours, theirs = pair(**settings)
        torch._dynamo.reset()
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        hold(compiled(*raw(), SIZES), theirs(*raw(), SIZES))
        hold(compiled(*raw(seed=1), SIZES + 1), theirs(*raw(seed=1), SIZES + 1))


def test_inputs_stay_as_they_are_and_gradients_flow():
    logits, boxes = (value.requires_grad_() for value in raw())
    before = logits.detach().clone(), boxes.detach().clone()
    rows = pair(confidence_filtering=False)[0](logits, boxes, SIZES)
    rows[..., 1:].sum().backward()
    assert_same((logits.detach(), boxes.detach()), before)
    assert logits.grad.ne(0).sum() == 3 * 50
    assert_same(logits.grad.ne(0).any(-1), boxes.grad.ne(0).any(-1))


# --- the rows of docs/drop-ins.md ---


def test_ties_go_by_query_and_class():
    logits, boxes = raw()
    coarse = (logits / 2).round() * 2
    rows = pair(confidence_filtering=False)[0](coarse, boxes, SIZES)
    order = coarse.flatten(1).argsort(dim=1, descending=True, stable=True)[:, :50]
    assert_same(rows[..., 0], (order % 7).float())


def test_more_queries_asked_for_than_there_are_pairs():
    ours, theirs = pair(num_top_queries=1000, confidence_filtering=False)
    assert ours(*raw(), SIZES).shape == (3, 280, 6)
    with pytest.raises(RuntimeError, match="out of range"):
        theirs(*raw(), SIZES)


def test_another_number_of_classes_is_an_error_and_not_a_wrong_label():
    ours, theirs = pair(num_classes=9)
    with pytest.raises(ValueError, match="num_classes = 9 classes; got 7") as error:
        ours(*raw(), SIZES)
    one_line(error)
    assert max(rows[:, 0].max() for rows in theirs(*raw(), SIZES)) > 6


def test_half_precision_keeps_class_ids_and_scores_in_float32():
    logits = torch.full((1, 1, 3000), -5.0)
    logits[0, 0, 2999] = 1.0
    ours, theirs = pair(num_classes=3000, num_top_queries=1, confidence_filtering=False)
    arguments = logits.half(), torch.rand(1, 1, 4).half(), SIZES[:1]
    assert float(ours(*arguments)[0, 0, 0]) == 2999
    assert float(theirs(*arguments)[0, 0, 0]) != 2999  # float16 has no 2999


def test_nan_is_no_detection():
    logits, boxes = raw()
    logits[:, 0] = float("nan")
    ours, theirs = pair(num_top_queries=280, confidence_filtering=False)
    rows = ours(logits, boxes, SIZES)
    assert rows.isfinite().all()
    assert_same(rows[:, -7:], torch.tensor([-1.0, 0, 0, 0, 0, 0]).expand(3, 7, 6))
    assert theirs(logits, boxes, SIZES)[:, :7, 1].isnan().all()


@pytest.mark.parametrize("wrong", [torch.nn.Linear(2, 2), None])
def test_like_takes_kornias_module_alone(wrong):
    with pytest.raises(TypeError, match="expected kornia's DETRPostProcessor; got") as error:
        DETRPostProcessor.like(wrong)
    one_line(error)


def test_a_score_equal_to_the_threshold_is_dropped_there_and_here():
    for post in pair(confidence_threshold=0.5, num_top_queries=7):
        assert [len(rows) for rows in post(torch.zeros(1, 1, 7), torch.rand(1, 1, 4), SIZES[:1])] == [0]
