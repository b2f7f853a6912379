"""Whole detectors are compared by matching."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from detpost import Detections
from detpost.verify.matching import match_detections, pair_up


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


@pytest.mark.parametrize(("first", "second"), [(130, 130), (6000, 6000), (6000, 2000)])
def test_a_cluster_of_identical_boxes_of_any_size_is_paired(first, second):
    found = match([(0.9, 1, BOX)] * first, [(0.9, 1, BOX)] * second)
    assert (found.first, found.second, found.matched) == (first, second, 2 * min(first, second))


def test_a_path_through_thousands_of_pairs_is_found():
    # All rows but the last take the first column that fits; the last fits only that of the first: every pair moves.
    steps = torch.arange(3000)
    fits = (steps[:, None] == steps) | (steps[:, None] == steps - 1)
    fits = torch.cat((fits[:-1], torch.eye(3000, dtype=torch.bool)[:1]))
    assert len(pair_up(fits)) == 3000


def test_as_many_are_paired_as_scipy_pairs():
    generator = np.random.default_rng(0)
    for _ in range(300):
        fits = generator.random(generator.integers(1, 25, 2)) < generator.random() ** 2
        pairs = pair_up(torch.from_numpy(fits))
        assert all(fits[row, column] for row, column in pairs.items())
        assert len(set(pairs.values())) == len(pairs)
        assert len(pairs) == (maximum_bipartite_matching(csr_array(fits)) >= 0).sum()


def test_every_detection_above_the_threshold_that_can_have_a_partner_counts():
    generator = np.random.default_rng(0)
    scores, widths = (0.4994, 0.4999, 0.5003, 0.5008, 0.5012), (100.0, 100.8, 101.6, 102.4)
    for _ in range(200):
        sides = [
            [
                (float(generator.choice(scores)), 1, [0.0, 0.0, float(generator.choice(widths)), 100.0])
                for _ in range(generator.integers(1, 8))
            ]
            for _ in range(2)
        ]
        pays = [
            [
                ((a[0] > 0.5) + (b[0] > 0.5))
                * (abs(a[0] - b[0]) <= 1e-3 and min(a[2][2], b[2][2]) / max(a[2][2], b[2][2]) >= 0.99)
                for b in sides[1]
            ]
            for a in sides[0]
        ]
        best = np.array(pays)[linear_sum_assignment(pays, maximize=True)].sum()
        assert match(*sides).matched == best
