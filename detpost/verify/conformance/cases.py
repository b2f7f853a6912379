"""The raw outputs that a runner is asked to decode."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detpost.spec import DecodeSpec

__all__ = ["Case", "all_cases"]

Array = NDArray[Any]

# Between them, each value of each field with each value of every other one.
_SPECS: dict[str, DecodeSpec] = {
    "rtdetr": DecodeSpec(top_k=60),
    "detr": DecodeSpec.preset("detr", top_k=60),
    "rfdetr": DecodeSpec(top_k=60, clip=True),
    "owlvit": DecodeSpec(selection="per_query", top_k=60),
    "softmax-flat": DecodeSpec(activation="softmax", top_k=60, box_format="xyxy", clip=True),
    "background-first": DecodeSpec(background="first", top_k=60, box_format="xywh"),
    "softmax-background-first": DecodeSpec(
        activation="softmax", selection="per_query", background="first", top_k=20, box_format="xyxy"
    ),
    "softmax-flat-background-last": DecodeSpec(activation="softmax", background="last", top_k=20, box_format="xywh"),
    "per-query-background-last": DecodeSpec(selection="per_query", background="last", clip=True, box_format="xyxy"),
    "per-query-xywh": DecodeSpec(activation="softmax", selection="per_query", box_format="xywh", clip=True, top_k=60),
    "sigmoid-background-last": DecodeSpec(background="last", box_format="xyxy", top_k=20),
    "softmax-flat-background-first": DecodeSpec(activation="softmax", background="first", clip=True, top_k=60),
}

# The two kinds of head that most detectors have are asked everything, the other specs what tells them apart.
_ASKED_EVERYTHING = ("rtdetr", "detr")
_ASKED_OF_ALL = ("plain", "equal logits", "NaN and infinities", "half precision")


@dataclass(frozen=True)
class Case:
    """One batch of raw outputs.

    Args:
        name: the spec's name and what is in the logits.
        spec: how it is to be decoded.
        logits: (B, Q, C), float32 or float16.
        boxes: (B, Q, 4), float32, in the spec's format, in units of the image.
        image_sizes: (B, 2), int64, (height, width).
    """

    name: str
    spec: DecodeSpec
    logits: Array
    boxes: Array
    image_sizes: Array

    def inputs(self) -> dict[str, Any]:
        """Give what a runner gets: three arrays, and the spec as JSON.

        The arrays are copies: many decodes convert boxes in place, and the case is judged by its own afterwards.
        """
        return {
            "pred_logits": self.logits.copy(),
            "pred_boxes": self.boxes.copy(),
            "image_sizes": self.image_sizes.copy(),
            "spec": json.dumps(asdict(self.spec)),
        }


def all_cases(preset: str | None = None) -> list[Case]:
    """Make the suite.

    Args:
        preset: ask a runner that knows one family everything about it, and nothing else; ``None`` asks every spec.

    Returns:
        The cases: the same numbers each time.

    Raises:
        ValueError: an unknown preset.

    Example:
        >>> len(all_cases()) > len(all_cases("rtdetr")) > 10
        True
    """
    if preset is not None:
        return list(_cases_of(preset, DecodeSpec.preset(preset), tuple(_LOGITS)))
    return [
        case
        for name, spec in _SPECS.items()
        for case in _cases_of(name, spec, tuple(_LOGITS) if name in _ASKED_EVERYTHING else _ASKED_OF_ALL)
    ]


def _cases_of(name: str, spec: DecodeSpec, kinds: tuple[str, ...]) -> Iterator[Case]:
    for kind in kinds:
        random = np.random.default_rng(sum(map(ord, name + kind)))
        logits, threshold = _LOGITS[kind](random)
        made = DecodeSpec(**{**asdict(spec), "score_threshold": threshold})
        boxes = _boxes(random, logits.shape[0], logits.shape[1], spec.box_format)
        yield Case(f"{name}: {kind}", made, logits, boxes, _SIZES[: len(logits)])


# Upright, lying and square: whoever swaps height and width, or takes the first image's size for all, is seen.
_SIZES = np.array([[480, 640], [1200, 700], [333, 333]], dtype=np.int64)


def _boxes(random: np.random.Generator, batch: int, queries: int, box_format: str) -> Array:
    """Give boxes that differ in every query; one in six reaches over the edge of its image."""
    center = random.uniform(0.15, 0.85, (batch, queries, 2))
    size = random.uniform(0.02, 0.28, (batch, queries, 2))
    center = np.where(random.random((batch, queries, 1)) < 1 / 6, center + random.choice([-0.15, 0.15]), center)
    low, high = center - size / 2, center + size / 2
    parts = {"cxcywh": (center, size), "xyxy": (low, high), "xywh": (low, size)}[box_format]
    return np.concatenate(parts, axis=-1).astype(np.float32)


Logits = Callable[[np.random.Generator], tuple[Array, float | None]]


def _plain(random: np.random.Generator) -> tuple[Array, float | None]:
    return random.normal(-2, 2, (3, 40, 7)).astype(np.float32), None


def _large(random: np.random.Generator) -> tuple[Array, float | None]:
    return random.normal(-4, 2, (2, 300, 80)).astype(np.float32), None


def _equal(random: np.random.Generator) -> tuple[Array, float | None]:
    """Give steps of 1/2, as a quantised head gives them."""
    return (np.round(random.normal(-1, 1, (3, 40, 7)) * 2) / 2).astype(np.float32), None


def _all_equal(random: np.random.Generator) -> tuple[Array, float | None]:
    return np.full((2, 30, 5), -1.5, dtype=np.float32), None


def _saturated(random: np.random.Generator) -> tuple[Array, float | None]:
    """Logits whose sigmoids round to the same float, mostly 1."""
    return random.uniform(14, 40, (2, 40, 7)).astype(np.float32), None


def _not_numbers(random: np.random.Generator) -> tuple[Array, float | None]:
    logits = random.normal(-2, 2, (3, 40, 7))
    kind = random.integers(0, 12, logits.shape)
    image, query, _ = np.ogrid[:3, :40, :7]
    # Of the second image nothing is a number; of the third, few queries have a chance.
    chosen = [image == 1, (image == 2) & (query < 35), kind == 0, kind == 1, kind == 2]
    return np.select(chosen, [np.nan, -np.inf, np.nan, np.inf, -np.inf], logits).astype(np.float32), None


def _half(random: np.random.Generator) -> tuple[Array, float | None]:
    return random.normal(-2, 2, (2, 60, 20)).astype(np.float16), None


def _few(random: np.random.Generator) -> tuple[Array, float | None]:
    """Fewer candidates than any spec keeps."""
    return random.normal(0, 2, (2, 3, 4)).astype(np.float32), None


def _one(random: np.random.Generator) -> tuple[Array, float | None]:
    return random.normal(0, 1, (1, 1, 2)).astype(np.float32), None


def _on_the_threshold(random: np.random.Generator) -> tuple[Array, float | None]:
    """Scores of exactly 1/2, of sigmoid and, where two classes share a query, of softmax: not above 1/2."""
    logits = random.normal(-1, 2, (2, 40, 5))
    _, query, channel = np.ogrid[:2, :40, :5]
    alone = (query % 3 == 0) & (channel == 1)
    shared = query % 3 == 1
    is_half = alone | (shared & ((channel == 1) | (channel == 2)))
    return np.select([is_half, shared], [0.0, -np.inf], logits).astype(np.float32), 0.5


def _signed_zeros(random: np.random.Generator) -> tuple[Array, float | None]:
    return np.where(random.random((2, 40, 5)) < 0.5, -0.0, 0.0).astype(np.float32), None


_LOGITS: dict[str, Logits] = {
    "plain": _plain,
    "300 queries, 80 classes": _large,
    "equal logits": _equal,
    "all equal": _all_equal,
    "saturated": _saturated,
    "NaN and infinities": _not_numbers,
    "half precision": _half,
    "fewer candidates than slots": _few,
    "one query": _one,
    "scores on the threshold": _on_the_threshold,
    "signed zeros": _signed_zeros,
}
