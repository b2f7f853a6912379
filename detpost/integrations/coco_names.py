"""The names of COCO's 80 classes, for weights that bring none."""

from __future__ import annotations

__all__ = ["COCO_NAMES", "names_for"]

_NAMES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, "
    "stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, "
    "backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, "
    "baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, "
    "bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, "
    "potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, cell phone, microwave, "
    "oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
)
COCO_NAMES = tuple(_NAMES.split(", "))


def names_for(classes: int) -> dict[int, str]:
    """Name the labels of a network without names: COCO's, where it has as many classes.

    Args:
        classes: C.

    Returns:
        The name of each label; empty where nothing says them.

    Example:
        >>> names_for(80)[16], names_for(7)
        ('dog', {})
    """
    return dict(enumerate(COCO_NAMES)) if classes == len(COCO_NAMES) else {}
