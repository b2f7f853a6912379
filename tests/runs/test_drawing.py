"""Pictures show what was found, and nothing else."""

import time

import numpy as np
import torch

from detpost.runs import drawing
from detpost.runs.drawing import _colour_of, draw


def found(*names, boxes=((10.0, 12.0, 30.0, 34.0), (50.0, 60.0, 70.0, 90.0))):
    count = len(names)
    return {
        "scores": torch.linspace(0.9, 0.6, count),
        "labels": torch.arange(count),
        "boxes": torch.tensor(boxes[:count]).reshape(-1, 4),
        "label_names": list(names),
    }


def ground(picture, label):
    """Count the pixels of a label's colour."""
    return (picture == np.array(_colour_of(label), np.uint8)).all(2).sum()


def test_small_images_are_enlarged_and_nothing_found_changes_nothing():
    image = torch.randint(0, 256, (3, 100, 130), dtype=torch.uint8)
    drawn = draw(image, found())
    assert drawn.shape == (400, 520, 3)
    assert (drawn[::4, ::4] == image.permute(1, 2, 0).numpy()).all()
    assert draw(torch.zeros(3, 700, 300, dtype=torch.uint8), found()).shape == (700, 300, 3)


def test_boxes_stand_where_they_were_found_in_a_colour_of_their_class():
    image = torch.zeros(3, 640, 640, dtype=torch.uint8)
    drawn = draw(image, found("cat", "dog", boxes=((100.0, 200.0, 300.0, 400.0), (400.0, 450.0, 600.0, 620.0))))
    colours = [drawn[y, x].tolist() for x, y in ((300, 300), (600, 550))]  # on the right edge of each
    assert [0, 0, 0] not in colours
    assert colours[0] != colours[1]
    assert not drawn[210:390, 110:290].any()  # inside
    assert not drawn[20:150].any()
    assert (image == 0).all()


def test_the_class_name_is_written():
    image = torch.zeros(3, 640, 640, dtype=torch.uint8)
    one, other = (draw(image, found(name)) for name in ("cat", "dromedary"))
    assert (one != other).any()


def test_names_beyond_ascii_and_boxes_beyond_the_image_are_drawn():
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    drawn = draw(image, found("größe", "数字", boxes=((-20.0, -20.0, 50.0, 50.0), (90.0, 90.0, 150.0, 400.0))))
    assert drawn.any()
    assert drawn.dtype == np.uint8


def test_labels_of_boxes_at_one_place_are_all_seen():
    image = torch.zeros(3, 640, 640, dtype=torch.uint8)
    box = (200.0, 200.0, 400.0, 400.0)
    drawn = draw(image, found("one", "two", "three", boxes=(box, box, box)))
    assert min(ground(drawn, label) for label in range(3)) > 300  # all but the last one's box is painted over


def test_a_label_stays_within_the_image():
    image = torch.zeros(3, 700, 700, dtype=torch.uint8)
    for box in ((0.0, 0.0, 20.0, 20.0), (690.0, 0.0, 700.0, 20.0), (0.0, 690.0, 20.0, 700.0)):
        assert ground(draw(image, found("name", boxes=(box,))), 0) > 500


def test_drawing_costs_what_is_drawn_and_not_the_image_for_each_detection():
    image, many = torch.zeros(3, 3000, 4000, dtype=torch.uint8), 60
    boxes = torch.rand(many, 2).repeat(1, 2) * 2800 + torch.tensor([0.0, 0.0, 90.0, 90.0])
    row = {"scores": torch.ones(many), "labels": torch.arange(many), "boxes": boxes, "label_names": ["a"] * many}
    seconds = []
    for found_here in (found(), row):
        times = []
        for _ in range(3):
            began = time.thread_time()
            drawing.drawn(image, found_here)
            times.append(time.thread_time() - began)
        seconds.append(min(times))
    assert seconds[1] < 4 * seconds[0]
