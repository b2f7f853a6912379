"""What decodes are known to do otherwise, as changes to a plan, with the words for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from detpost.verify.conformance.plan import Plan

__all__ = ["FAULTS", "Fault"]


@dataclass(frozen=True)
class Fault:
    """One thing done otherwise.

    Args:
        name: a short one, for machines.
        words: what the runner does, for people.
        change: gives the changed plan; the plan itself where the fault does not concern it.
    """

    name: str
    words: str
    change: Callable[[Plan], Plan]


def _always(**fields: Any) -> Callable[[Plan], Plan]:
    return lambda plan: replace(plan, **fields)


def _where(field: str, value: Any, **fields: Any) -> Callable[[Plan], Plan]:
    return lambda plan: replace(plan, **fields) if getattr(plan, field) == value else plan


def _threshold(**fields: Any) -> Callable[[Plan], Plan]:
    return lambda plan: plan if plan.threshold is None else replace(plan, **fields)


# Of two that explain the same, the earlier is named.
FAULTS = (
    Fault("label-plus-one", "labels are one too high", lambda plan: replace(plan, label_shift=plan.label_shift + 1)),
    Fault("label-minus-one", "labels are one too low", lambda plan: replace(plan, label_shift=plan.label_shift - 1)),
    Fault(
        "width-height",
        "image sizes are read as (width, height), where they are (height, width)",
        _always(sizes_read="width, height"),
    ),
    Fault("first-size", "the first image's size is used for the whole batch", _always(sizes="first")),
    Fault("last-size", "the last image's size is used for the whole batch", _always(sizes="last")),
    Fault("normalised", "boxes are left in units of the image, where pixels are asked for", _always(sizes="none")),
    Fault(
        "argmax",
        "each query is kept for its best class alone (argmax), where the best pairs of query and class are asked for",
        _where("selection", "flat", selection="per_query"),
    ),
    Fault(
        "flat",
        "queries are kept for several classes (flat top-k), where the best class of each is asked for",
        _where("selection", "per_query", selection="flat"),
    ),
    Fault(
        "sigmoid",
        "scores are sigmoids, where softmax is asked for",
        _where("activation", "softmax", activation="sigmoid"),
    ),
    Fault(
        "softmax",
        "scores are a softmax, where sigmoid is asked for",
        _where("activation", "sigmoid", activation="softmax"),
    ),
    Fault("no-activation", "scores are the logits, without sigmoid or softmax", _always(activation="none")),
    Fault("background-kept", 'the channel for "no object" is reported as a class', _always(background="none")),
    Fault(
        "background-last",
        'the last channel is taken for "no object", where it is not',
        _always(background="last"),
    ),
    Fault(
        "background-first",
        'the first channel is taken for "no object", where it is not',
        _always(background="first"),
    ),
    Fault(
        "softmax-without-background",
        'the softmax leaves out the channel for "no object"',
        _where("activation", "softmax", softmax_over="foreground"),
    ),
    Fault(
        "index-swapped",
        "a flat index is taken apart as class * C + query, where it is query * C + class",
        _where("selection", "flat", pairs="class, query"),
    ),
    Fault(
        "as-many-as-queries",
        "no more detections are kept than there are queries, where more are asked for",
        _where("selection", "flat", most="queries"),
    ),
    Fault("box-of-slot", "slot i has the box of query i, not of the query that was kept", _always(box_of="slot")),
    *(
        Fault(f"reads-{name}", f"boxes that come in are read as {name}, where they are not", _always(box_format=name))
        for name in ("xyxy", "cxcywh", "xywh")
    ),
    *(
        Fault(f"writes-{name}", f"boxes that go out are {name}, where xyxy is asked for", _always(written=name))
        for name in ("xywh", "cxcywh")
    ),
    Fault("not-clipped", "boxes are not clipped to the image, where it is asked for", _always(clip=False)),
    Fault("clipped", "boxes are clipped to the image, where it is not asked for", _always(clip=True)),
    Fault("no-threshold", "the score threshold is not applied", _always(threshold=None)),
    Fault(
        "keeps-threshold",
        "scores equal to the threshold are kept (>=), where only those above it are (>)",
        _threshold(keeps_threshold=True),
    ),
    Fault("higher-index-first", "of equal scores the higher index comes first", _always(ties="higher")),
    Fault(
        "order-by-scores",
        "the order is by rounded scores: logits whose sigmoids round to the same float are taken for equal",
        _where("order_by", "logits", order_by="float32 scores"),
    ),
    Fault("half-order", "the order is by scores rounded to half precision", _always(order_by="float16 scores")),
    Fault("half-scores", "scores are rounded to half precision", _always(score_dtype="float16")),
    Fault("nan-first", "NaN logits are selected ahead of numbers, though not valid", _always(nan="first")),
    Fault("nan-valid", "NaN logits are selected ahead of numbers, and valid", _always(nan="first, valid")),
    Fault("nan-zero", "NaN logits are taken for 0", _always(nan="zero")),
    Fault("not-sorted", "detections come in the order of their queries, not of their scores", _always(is_sorted=False)),
    Fault("reversed", "detections come the other way round, the lowest score first", _always(is_reversed=True)),
    Fault(
        "not-cleared",
        "slots that are not valid keep their detection (they read score 0, label -1, box 0 0 0 0)",
        _always(invalid="left"),
    ),
    Fault(
        "invalid-anything",
        "slots that are not valid hold something (they read score 0, label -1, box 0 0 0 0)",
        _always(invalid="anything"),
    ),
    Fault("no-order-of-ties", "equal scores come in no fixed order", _always(ties="any")),
)
