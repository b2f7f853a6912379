"""Whatever a JSON file holds, an evaluation answers with numbers or with one true line."""

import copy
import json
import math
import random

import numpy as np
import pytest

from detpost.runs.coco_rows import _lengths
from detpost.runs.evaluate import evaluate

SIZE = [20, 30]
SQUARE = [[2, 2, 10, 2, 10, 10, 2, 10]]
TRUTH = {
    "images": [{"id": 1, "file_name": "a.png", "width": 30, "height": 20}],
    "categories": [{"id": 1, "name": "a"}],
    "annotations": [
        {
            "id": 1,
            "image_id": 1,
            "category_id": 1,
            "bbox": [2, 2, 8, 8],
            "area": 64,
            "iscrowd": 0,
            "segmentation": SQUARE,
        }
    ],
}
# COCO's own compression of 40 background pixels, 100 foreground ones and the rest.
MASK = {"size": SIZE, "counts": "X1T3\\>"}
ROW = {"image_id": 1, "category_id": 1, "bbox": [2, 2, 8, 8], "score": 0.5, "segmentation": MASK}


def compressed(counts):
    mask = pytest.importorskip("pycocotools.mask")
    return mask.frPyObjects({"size": [1, sum(counts)], "counts": counts}, 1, sum(counts))["counts"]


def test_the_example_is_whole(tmp_path):
    mask = pytest.importorskip("pycocotools.mask")
    assert int(mask.area({"size": SIZE, "counts": MASK["counts"].encode()})) == 100
    (tmp_path / "gt.json").write_text(json.dumps(TRUTH))
    # The box is the truth's; the mask, five whole columns, hardly meets its square.
    for iou_type, expected in (("bbox", 1), ("segm", 0)):
        assert evaluate(tmp_path / "gt.json", [ROW], iou_type=iou_type).metrics["AP"] == expected


@pytest.mark.parametrize("seed", range(20))
def test_run_lengths_are_read_as_coco_writes_them(seed):
    draw = random.Random(seed)
    counts = [draw.choice([0, 1, 15, 16, 17, 500, draw.randrange(10**6)]) for _ in range(draw.randrange(1, 40))]
    counts = [*counts, 1]
    encoded = compressed(counts)
    assert _lengths(encoded) == _lengths(encoded.decode()) == counts


@pytest.mark.parametrize("text", ["", "P", "5o", "~", "\n", "\u20ac", "\ud800", "o" * 22 + "0", "oooooooo0"])
def test_text_that_is_no_run_lengths_is_told(text):
    assert _lengths(text) is None or min(_lengths(text)) < 0


def put(target, place, value):
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value


ANNOTATION = ("annotations", 0)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (
            (*ANNOTATION, "bbox"),
            [2, 2, "8", 8],
            r"the bbox of annotation 1 must be x, y, width, height; got \[2, 2, '8', 8\]",
        ),
        ((*ANNOTATION, "bbox"), "box", r"the bbox of annotation 1 must be x, y, width, height; got 'box'"),
        ((*ANNOTATION, "bbox"), [0, 0, 10**400, 4], r"the bbox of annotation 1 must be"),
        ((*ANNOTATION, "bbox"), None, r"1 annotations have no bbox, the first has \['id'"),
        ((*ANNOTATION, "area"), "big", r"the area of annotation 1 must be a number; got 'big'"),
        ((*ANNOTATION, "iscrowd"), [], r"the iscrowd of annotation 1 must be 0 or 1; got \[\]"),
        ((*ANNOTATION, "iscrowd"), 2, r"the iscrowd of annotation 1 must be 0 or 1; got 2"),
        ((*ANNOTATION, "image_id"), [1], r"1 annotations are of no image or category of it"),
        ((*ANNOTATION, "category_id"), {}, r"1 annotations are of no image or category of it"),
        ((*ANNOTATION, "id"), True, r"1 of 1 annotations have no whole number as id"),
        ((*ANNOTATION, "id"), 2**70, r"1 of 1 annotations have no whole number as id"),
        ((*ANNOTATION, "id"), [[]], r"1 of 1 annotations have no whole number as id"),
        (("images", 0, "file_name"), [1], r"the file_name of id 1 must be text; got \[1\]"),
        (("categories", 0, "name"), {"a": 1}, r"the name of id 1 must be text; got \{'a': 1\}"),
        (("images", 0, "id"), 1.0, r"1 of 1 images have no whole number as id"),
        (("annotations",), {"a": 1}, r"annotations must be a list of objects"),
        (("annotations",), [[]], r"annotations must be a list of objects"),
        (("categories",), None, r"categories must be a list of objects"),
    ],
)
def test_a_ground_truth_of_odd_values_is_named_by_row_and_value(tmp_path, place, value, message):
    truth = copy.deepcopy(TRUTH)
    put(truth, place, value)
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    with pytest.raises(ValueError, match=message) as caught:
        evaluate(tmp_path / "gt.json", [ROW])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bbox", [0, 0, "4", 4], r"the bbox of result 1 must be x, y, width, height; got \[0, 0, '4', 4\]"),
        ("bbox", "text", r"the bbox of result 1 must be x, y, width, height; got 'text'"),
        ("score", "high", r"the score of result 1 must be a number; got 'high'"),
        ("score", 10**400, r"the score of result 1 must be a number"),
        ("score", True, r"the score of result 1 must be a number; got True"),
        ("image_id", [1], r"the image_id of result 1 must be a whole number; got \[1\]"),
        ("category_id", 1.5, r"the category_id of result 1 must be a whole number; got 1.5"),
        ("category_id", 2**64, r"the category_id of result 1 must be a whole number"),
    ],
)
def test_results_of_odd_values_are_named_by_row_and_value(tmp_path, key, value, message):
    (tmp_path / "gt.json").write_text(json.dumps(TRUTH))
    with pytest.raises(ValueError, match=message) as caught:
        evaluate(tmp_path / "gt.json", json.loads(json.dumps([{**ROW, key: value}])))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "mask",
    [
        {"size": SIZE, "counts": "04"},  # the sum is not the image's: an evaluation in C++ would never end
        {"size": SIZE, "counts": "~~~~"},
        {"size": SIZE, "counts": [40, 560]},
        {"size": SIZE, "counts": {}},
        {"size": SIZE},
        {"size": [-20, -30], "counts": MASK["counts"]},
        {"size": [20], "counts": MASK["counts"]},
        {"size": ["20", "30"], "counts": MASK["counts"]},
        {"size": [2**40, 2**40], "counts": MASK["counts"]},
        SQUARE,
        "text",
        7,
    ],
    ids=str,
)
def test_a_mask_that_is_none_is_one_line(tmp_path, mask):
    (tmp_path / "gt.json").write_text(json.dumps(TRUTH))
    for iou_type, row in (("segm", {**ROW}), ("bbox", {key: ROW[key] for key in ROW if key != "bbox"})):
        with pytest.raises(ValueError, match="segmentation of result 1 must be run lengths") as caught:
            evaluate(tmp_path / "gt.json", [{**row, "segmentation": mask}], iou_type=iou_type)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "mask",
    [
        *(["text"], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], [["a"] * 6], [[1e300] * 6], [[0, 0, 1e9, 0, 1e9, 1e9]]),
        *({"size": SIZE, "counts": counts} for counts in ([5], [-5, 605], [5, "a"], "04", 3)),
        *("text", 3, {"size": SIZE}),
    ],
    ids=str,
)
def test_a_ground_truths_mask_that_is_none_is_one_line(tmp_path, mask):
    truth = copy.deepcopy(TRUTH)
    put(truth, (*ANNOTATION, "segmentation"), mask)
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    with pytest.raises(ValueError, match="segmentation of annotation 1 must be") as caught:
        evaluate(tmp_path / "gt.json", [ROW], iou_type="segm")
    assert "\n" not in str(caught.value)
    assert evaluate(tmp_path / "gt.json", [ROW]).metrics["AP"] > 0  # boxes do not ask for it


def test_a_polygon_needs_the_size_of_its_image(tmp_path):
    truth = copy.deepcopy(TRUTH)
    del truth["images"][0]["width"]
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    with pytest.raises(ValueError, match="image 1 has none"):
        evaluate(tmp_path / "gt.json", [ROW], iou_type="segm")


ODD = [
    *(None, True, False, 0, -1, 1, 2, 7, 1.5, -0.0, 2**31, 2**63, 10**400, 1e308, "", "a", "1", "\ud800", "\0\n"),
    *(
        [],
        {},
        [[]],
        [1],
        [1, 2, 3, 4],
        ["a"] * 4,
        [[1, 2, 3, 4, 5, 6]],
        {"a": {"b": []}},
        {"size": SIZE, "counts": "04"},
    ),
    *(
        float("nan"),
        float("inf"),
        [0, 0, float("nan"), 1],
        [0, 0, 0, 0],
        [0, 0, -4, -4],
        [1e308] * 4,
        [1] * 5,
        MASK,
        ROW,
    ),
]


def places(value, prefix=()):
    """Every place in a structure, the containers themselves included."""
    yield from ([prefix] if prefix else [])
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from places(child, (*prefix, key))


def answer(truth, results, iou_type):
    try:
        return evaluate(truth, results, iou_type=iou_type), ""
    except ValueError as error:
        return None, str(error)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_any_value_anywhere_gives_numbers_or_one_line(tmp_path, iou_type):
    draw = random.Random(11)
    path, both = tmp_path / "gt.json", {"truth": TRUTH, "results": [ROW, {**ROW, "score": 0.25}]}
    everywhere = [(place, value) for place in places(both) if len(place) > 1 for value in ODD]
    refused = 0
    for first in draw.sample(everywhere, 700):
        data = copy.deepcopy(both)
        for place, value in (first, *draw.sample(everywhere, draw.randrange(2))):
            try:
                put(data, place, copy.deepcopy(value))
            except (KeyError, IndexError, TypeError):  # an earlier one replaced what this one lies in
                continue
        if draw.random() < 0.2:
            data["truth"].pop(draw.choice(sorted(data["truth"])))
        path.write_text(json.dumps(data["truth"]))
        (tmp_path / "results.json").write_text(json.dumps(data["results"]))
        found, line = answer(path, tmp_path / "results.json", iou_type)
        refused += found is None
        assert len(line.splitlines()) <= 1, (first, line)
        assert len(line) < 600, (first, line)
        if found is not None:
            assert all(math.isfinite(value) for value in found.metrics.values()), first
            assert np.isfinite([row.ap for row in found.classes]).all()
    assert 200 < refused < 700
