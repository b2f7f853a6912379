"""Whole detectors are compared by matching."""

import pytest
import torch

from detpost import Detections
from detpost.export.matching import match_detections


def detections(rows):
    scores, labels, boxes = (torch.tensor([[row[i] for row in rows]]) for i in range(3))
    return Detections(
        scores, labels, boxes.reshape(1, -1, 4).float(), torch.zeros_like(labels), torch.ones_like(labels).bool()
    )


BOX, OTHER = [0.0, 0.0, 100.0, 100.0], [200.0, 200.0, 300.0, 300.0]


def match(first, second, threshold=0.5):
    return match_detections(detections(first), detections(second), threshold)[0]


def test_the_same_detections_in_another_order_match():
    one, other = [(0.9, 1, BOX), (0.8, 2, OTHER)], [(0.8, 2, OTHER), (0.9, 1, BOX)]
    found = match(one, other)
    assert found.ok
    assert (found.first, found.second, found.matched) == (2, 2, 4)


@pytest.mark.parametrize(
    ("change", "ok"),
    [
        ((0.9005, 1, BOX), True),
        ((0.902, 1, BOX), False),  # more than 1e-3
        ((0.9, 2, BOX), False),
        ((0.9, 1, [0.0, 0.0, 100.0, 99.5]), True),
        ((0.9, 1, [0.0, 0.0, 100.0, 98.0]), False),  # IoU 0.98
    ],
)
def test_label_overlap_and_score_all_count(change, ok):
    assert match([(0.9, 1, BOX)], [change]).ok is ok


def test_differences_of_matched_pairs_are_given():
    found = match([(0.9, 1, BOX)], [(0.9004, 1, [0.0, 0.0, 100.25, 100.0])])
    assert found.box_difference == pytest.approx(0.25)
    assert found.score_difference == pytest.approx(0.0004, abs=1e-6)


def test_a_missing_or_a_doubled_detection_is_seen():
    assert not match([(0.9, 1, BOX), (0.8, 2, OTHER)], [(0.9, 1, BOX)]).ok
    assert not match([(0.9, 1, BOX)], [(0.9, 1, BOX), (0.9, 1, BOX)]).ok


def test_a_score_that_rounds_across_the_threshold_is_no_difference():
    assert match([(0.5002, 1, BOX)], [(0.4998, 1, BOX)]).ok
    assert not match([(0.5002, 1, BOX)], [(0.4980, 1, BOX)]).ok


def test_equal_boxes_of_no_area_overlap():
    assert match([(0.9, 1, [5.0, 5.0, 5.0, 5.0])], [(0.9, 1, [5.0, 5.0, 5.0, 5.0])]).ok


def test_near_copies_are_paired_as_well_as_can_be():
    near = [(0.9, 1, BOX), (0.9006, 1, BOX)]
    far = [(0.9012, 1, BOX), (0.9, 1, BOX)]  # the first fits only the second
    assert match(near, far).ok


def test_nothing_matches_nothing():
    assert match([(0.1, 1, BOX)], [(0.2, 1, BOX)]).ok
    with pytest.raises(ValueError, match="different numbers of images: 1 and 2"):
        match_detections(
            detections([(0.9, 1, BOX)]), Detections(*(torch.cat((x, x)) for x in detections([(0.9, 1, BOX)]))), 0.5
        )
