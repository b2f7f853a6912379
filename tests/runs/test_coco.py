"""Images and classes find their ids in annotation files."""

import pytest

from detpost.runs.coco import match_categories, match_images

COCO = [{"id": 1, "name": "person"}, {"id": 4, "name": "motorcycle"}, {"id": 13, "name": "stop sign"}]


def test_images_go_by_path_and_then_by_a_unique_last_part():
    images = [{"id": 1, "file_name": "a/x.png"}, {"id": 2, "file_name": "b/x.png"}, {"id": 3, "file_name": "c/y.png"}]
    assert match_images(images, ["a/x.png", "y.png"], "gt.json") == {"a/x.png": 1, "y.png": 3}
    for names in (["x.png"], ["d/y.png", "e/y.png"]):
        with pytest.raises(ValueError, match=r"images are not in gt\.json, the first is"):
            match_images(images, names, "gt.json")


@pytest.mark.parametrize(
    ("names", "rule", "expected"),
    [
        ({0: "Stop sign", 1: "person", 2: "motorcycle"}, "auto", {0: 13, 1: 1, 2: 4}),
        ({1: "person", 2: "N/A", 4: "motorcycle", 13: "stop sign"}, "auto", {1: 1, 4: 4, 13: 13}),
        ({0: "motorcycle"}, "auto", {0: 4}),
        ({0: "person", 1: "motorbike", 2: "stop sign"}, "auto", {0: 1, 1: 4, 2: 13}),  # old and new names of COCO
        ({0: "person", 1: "motorbike", 2: "stop sign"}, "name", {0: 1, 2: 13}),
        ({0: "x", 1: "y", 2: "z"}, "order", {0: 1, 1: 4, 2: 13}),
        ({0: "x", 1: "y"}, "label", {1: 1, 4: 4, 13: 13}),
    ],
)
def test_labels_find_their_category(names, rule, expected):
    assert match_categories(names, COCO, rule) == expected


@pytest.mark.parametrize(
    "names",
    [{0: "x", 1: "y", 2: "z"}, {0: "stop sign", 1: "person", 2: "bus"}, {0: "person", 1: "bus"}],
    ids=["no names", "another order", "another count"],
)
def test_classes_that_do_not_fit_are_one_line_and_not_a_guess(names):
    with pytest.raises(ValueError, match="say with --categories") as caught:
        match_categories(names, COCO)
    assert "\n" not in str(caught.value)


def test_an_unknown_rule_is_one_line():
    with pytest.raises(ValueError, match="unknown rule 'guess' for categories: take one of auto, name"):
        match_categories({}, COCO, "guess")
