"""The proof that two artifacts give the same answer.

Post-processors are compared on raw outputs, generated ones that provoke every disagreement known and given ones, and
must choose identical labels and queries. Whole detectors are compared on images by matching, because rounding
differences between runtimes can permute a detector's own raw rows; where an export keeps its raw outputs, its decode of
them must also be eager's to the bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from detpost.detections import Detections
from detpost.export.heads import MaskHead, columns_of, in_pytorch, raw_name
from detpost.export.layouts import NO_QUERIES
from detpost.heads._gather import by_query
from detpost.heads.found import Found, kept_slots
from detpost.postprocess import DetectionPostProcessor
from detpost.verify.matching import MOST_SCORE_DIFFERENCE, match_detections

__all__ = ["Check", "VerifyReport", "raw_cases", "verify"]

SCORE_TOLERANCE = 1e-5
BOX_TOLERANCE = 1e-5  # of the larger image side

LEAST_MASK_IOU = 0.99
MOST_MASK_PIXELS = 4  # whatever the IoU
PLACE_TOLERANCE = 1e-3  # of the larger image side: keypoints and oriented boxes of two runtimes
# Radians. An oriented box turned by as much has its ends moved by less than the tolerance of places.
ANGLE_TOLERANCE = 1e-3

RESIZED_SCORE_DIFFERENCE = 0.02  # of whole detectors on images whose pixels differ by 1 here and there

_RESIZED = f"one side resizes by itself, so that some pixels differ by 1: scores may by {RESIZED_SCORE_DIFFERENCE}"
_BORROWED = "images were prepared as the other side says, since attach had to assume it"


@dataclass(frozen=True)
class Check:
    """One comparison.

    Args:
        name: what was compared on which input.
        ok: whether it holds.
        compared: number of slots, or of detections in images.
        different: how many of them differ in label, query or validity, or have no partner.
        score_difference: greatest, over those that agree.
        box_difference: greatest, in pixels, over those that agree.
        detail: what a reader should know, empty where nothing.
    """

    name: str
    ok: bool
    compared: int
    different: int
    score_difference: float
    box_difference: float
    detail: str = ""


@dataclass(frozen=True)
class VerifyReport:
    """What :func:`verify` found.

    Args:
        artifact: what was verified.
        reference: what it was verified against.
        kind: ``"post-processor"`` or ``"detector"``.
        checks: every comparison made.
        warnings: what a reader should know of a file, whatever the comparisons say.

    Example:
        >>> post = DetectionPostProcessor.from_preset("rtdetr", top_k=10)
        >>> report = verify(post, post, num_queries=20, num_classes=5)
        >>> report.ok, report.kind, sum(check.different for check in report.checks)
        (True, 'post-processor', 0)
    """

    artifact: str
    reference: str
    kind: str
    checks: tuple[Check, ...] = field(default=())
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there was something to compare and all of it agrees."""
        return bool(self.checks) and all(check.ok for check in self.checks)

    def to_json(self) -> str:
        """Give the report as JSON.

        Returns:
            A JSON object with the fields above and ``ok``.
        """
        return json.dumps({**asdict(self), "ok": self.ok}, indent=1)

    def __str__(self) -> str:
        head = ("check", "", "compared", "different", "score diff", "box diff")
        rows = [
            (
                check.name,
                "ok" if check.ok else "DIFFERS",
                str(check.compared),
                str(check.different),
                f"{check.score_difference:.2g}",
                f"{check.box_difference:.2g} px",
            )
            for check in self.checks
        ]
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (head, *rows)
        ]
        details = [f"{check.name}: {check.detail}" for check in self.checks if check.detail]
        warned = [f"warning: {line}" for line in self.warnings]
        verdict = "the same answer" if self.ok else "NOT the same answer"
        return "\n".join(
            (
                f"{self.artifact} against {self.reference} ({self.kind})",
                *lines,
                *details,
                *warned,
                f"verdict: {verdict}",
            )
        )


def verify(
    artifact: Any,
    reference: Any,
    *,
    images: Sequence[Any] | None = None,
    raw: Sequence[tuple[Tensor, Tensor, Tensor]] | None = None,
    num_queries: int | None = None,
    num_classes: int | None = None,
    threshold: float = 0.3,
    allow_pickle: bool = False,
    progress: Callable[[str], None] | None = None,
) -> VerifyReport:
    """Compare an artifact with a reference.

    Args:
        artifact: a file that detpost wrote, of any format, a :class:`DetectionPostProcessor`, or a detector that
            :meth:`detpost.Detector.load` takes.
        reference: likewise; both must be post-processors or both detectors. A preset's name stands for its
            post-processor.
        images: for detectors, images to compare on beside the generated ones, as ``Detector.predict`` takes them.
        raw: for post-processors, raw outputs to compare on beside the generated ones: logits (B, Q, C), boxes
            (B, Q, 4), image sizes (B, 2).
        num_queries: Q, where neither side fixes it.
        num_classes: C, where neither side fixes it.
        threshold: for detectors, detections above it must have a partner.
        allow_pickle: as :meth:`detpost.Detector.load` takes it.
        progress: called with one line before each step.

    Returns:
        The report; ``report.ok`` is the answer, ``str(report)`` a table.

    Raises:
        OSError: a file that is missing.
        ValueError: a post-processor against a detector, or a file that detpost did not write.

    Example:
        >>> post = DetectionPostProcessor.from_preset("rtdetr", top_k=10)
        >>> verify(post, "rtdetr", num_queries=20, num_classes=5).ok  # the preset keeps 300
        False
    """
    from detpost.verify.artifact import open_artifact

    say = progress or (lambda _: None)
    say("opening both")
    one, other = (open_artifact(each, allow_pickle) for each in (artifact, reference))
    if one.kind != other.kind:
        raise ValueError(f"cannot compare a {one.kind} ({one.name}) with a {other.kind} ({other.name})")
    if one.kind == "post-processor":
        shape = one.shape or other.shape or ((num_queries or 300), (num_classes or 80))
        if other.shape and one.shape and one.shape != other.shape:
            raise ValueError(f"{one.name} takes (Q, C) = {one.shape} and {other.name} {other.shape}")
        checks = tuple(_check_raw(one, other, shape, raw or (), say))
    else:
        checks = tuple(_check_images(one, other, images or (), threshold, say))
    warned = tuple(f"{side.name}: {side.warning}" for side in (one, other) if side.warning)
    return VerifyReport(one.name, other.name, one.kind, checks, warned)


def _check_raw(
    one: Any,
    other: Any,
    shape: tuple[int, int],
    given: Sequence[tuple[Tensor, Tensor, Tensor]],
    say: Callable[[str], None],
) -> Iterator[Check]:
    batches = {side.batch for side in (one, other) if side.batch is not None}
    cases = [*raw_cases(*shape), *((f"given {i}", case) for i, case in enumerate(given))]
    for name, case in cases:
        say(f"comparing on {name}")
        for part in _in_batches(case, min(batches, default=0)):
            yield _compare_slots(name, one.decode(*part), other.decode(*part), part[2])
    for side in (one, other):
        if side.find is not None:
            yield from _bare_heads(side, shape)


def _bare_heads(side: Any, shape: tuple[int, int]) -> Iterator[Check]:
    """Hold what a bare decode gives beside boxes to what PyTorch makes of the same raw values for its detections."""
    generator = torch.Generator().manual_seed(0)
    batch = side.batch or 2
    logits, boxes = (torch.randn(batch, shape[0], last, generator=generator) for last in (shape[1], 4))
    sizes = torch.tensor([[40, 56], [33, 24]]).repeat(batch, 1)[:batch]
    made, raw = side.find(logits, boxes.sigmoid(), sizes)
    # Layouts without queries: those of the decode in PyTorch, which `decode` was compared with.
    found = made.detections
    queries = DetectionPostProcessor(side.spec)(logits, boxes.sigmoid(), sizes).queries
    slots = [
        (image, slot, (height, width))
        for image, (height, width) in enumerate(sizes.tolist())
        for slot in kept_slots(found.valid[image]).tolist()
    ]
    for head in side.heads:
        if isinstance(head, MaskHead):
            plain = Found(found, by_query(raw[raw_name(head)], queries), made.style)
            pairs = [(_mask(made, slot, size, image), _mask(plain, slot, size, image)) for image, slot, size in slots]
            yield _check_of_masks("masks", [_mask_gap(*pair) for pair in pairs])
            continue
        expected = in_pytorch(head, found._replace(queries=queries), raw[raw_name(head)], sizes)
        for what, values in expected.items():
            rows = [(made.beside[what][image, slot], values[image, slot], size) for image, slot, size in slots]
            yield _check_of_values(what, what, rows, SCORE_TOLERANCE)


def _in_batches(case: tuple[Tensor, Tensor, Tensor], size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Cut a case to a fixed batch size; the last part is filled up with its last image."""
    if not size:
        yield case
        return
    for start in range(0, len(case[0]), size):
        rows = torch.arange(start, start + size).clamp(max=len(case[0]) - 1)
        yield case[0][rows], case[1][rows], case[2][rows]


def _compare_slots(name: str, one: Detections, other: Detections, image_sizes: Tensor) -> Check:
    """Demand the same label, query and validity in every slot, and scores and boxes within tolerance."""
    if one.scores.shape != other.scores.shape:
        detail = f"{tuple(one.scores.shape)} slots against {tuple(other.scores.shape)}"
        return Check(name, False, max(one.scores.numel(), other.scores.numel()), 0, 0.0, 0.0, detail)
    # Where a file has no output `queries`, its boxes tell one query from another.
    known = (one.queries != NO_QUERIES) & (other.queries != NO_QUERIES)
    differs = (one.labels != other.labels) | (one.valid != other.valid) | (known & (one.queries != other.queries))
    agree = ~differs
    scores = torch.where(agree, (one.scores.double() - other.scores.double()).abs(), 0.0)
    boxes = torch.where(agree[..., None], (one.boxes.double() - other.boxes.double()).abs(), 0.0)
    boxes = torch.where(one.boxes == other.boxes, 0.0, boxes)  # inf - inf
    side = image_sizes.amax(dim=1).to(torch.float64)[:, None, None]
    count = int(differs.sum())
    score_gap, box_gap = (float(gap.max()) if gap.numel() else 0.0 for gap in (scores, boxes))
    within = score_gap <= SCORE_TOLERANCE and bool((boxes <= BOX_TOLERANCE * side).all())
    return Check(name, count == 0 and within, one.scores.numel(), count, score_gap, box_gap)


def _check_images(
    one: Any, other: Any, given: Sequence[Any], threshold: float, say: Callable[[str], None]
) -> Iterator[Check]:
    from detpost.images import read_image
    from detpost.zoo import sample_images

    named: list[tuple[str, Any]] = [(path.name, path) for path in sample_images()]
    named += [(str(getattr(image, "name", f"given {i}")), image) for i, image in enumerate(given)]
    named += [
        (f"noise {i}", torch.rand(3, 96 + 40 * i, 128, generator=torch.Generator().manual_seed(i))) for i in range(2)
    ]
    prepares = [_prepare_of(side, reference) for side, reference in ((one, other), (other, one))]
    tolerance = MOST_SCORE_DIFFERENCE if one.resizes == other.resizes else RESIZED_SCORE_DIFFERENCE
    for name, source in named:
        say(f"comparing on {name}")
        image = read_image(source)
        size = int(image.shape[1]), int(image.shape[2])
        found, expected = (side.detect([image], prepare) for side, prepare in zip((one, other), prepares, strict=True))
        match = match_detections(found.detections, expected.detections, threshold, tolerance)[0]
        total = match.first + match.second
        details = [_BORROWED] * (prepares != [None, None]) + [_RESIZED] * (one.resizes != other.resizes)
        details += [f"only one side gives {each}, which is not compared" for each in _given_by_one(found, expected)]
        detail = "; ".join(details) if name == named[0][0] else ""
        yield Check(name, match.ok, total, total - match.matched, match.score_difference, match.box_difference, detail)
        if found.whole is not None and expected.whole is not None:
            yield from _compare_beside(name, found.whole, expected.whole, match.pairs, size, tolerance)
        for side in (found, expected):
            if side.raw is not None:
                logits, boxes, sizes, spec = side.raw
                again = DetectionPostProcessor(spec)(logits, boxes, sizes)
                yield _compare_slots(f"{name}: decode of its own raw outputs", side.detections, again, sizes)
                yield from _masks_of_raw(f"{name}: masks of its own raw outputs", side, again, size)


def _given_by_one(one: Any, other: Any) -> list[str]:
    """Name what one of two sides gives beside boxes and the other does not."""
    given = [
        {*side.whole.beside, *([] if side.whole.masks is None else ["masks"])} if side.whole else set()
        for side in (one, other)
    ]
    return sorted(given[0] ^ given[1])


def _compare_beside(
    name: str,
    one: Found,
    other: Found,
    pairs: Sequence[tuple[int, int]],
    size: tuple[int, int],
    score_tolerance: float,
) -> Iterator[Check]:
    """Compare masks by their overlap, other values each in its own unit, of detections that are partners."""
    places = [kept_slots(side.detections.valid[0]) for side in (one, other)]
    slots = [(int(places[0][first]), int(places[1][second])) for first, second in pairs]
    if one.masks is not None and other.masks is not None:
        gaps = [_mask_gap(_mask(one, first, size), _mask(other, second, size)) for first, second in slots]
        yield _check_of_masks(f"{name}: masks", gaps)
    for what in sorted(one.beside.keys() & other.beside.keys()):
        rows = [(one.beside[what][0, a], other.beside[what][0, b], size) for a, b in slots]
        yield _check_of_values(f"{name}: {what}", what, rows, score_tolerance)


def _check_of_values(
    name: str, what: str, rows: Sequence[tuple[Tensor, Tensor, tuple[int, int]]], score_tolerance: float
) -> Check:
    """Make a check of an output beside the boxes: both values of each detection, and its image's (height, width)."""
    gaps = [_gaps(what, one, other) for one, other, _ in rows]
    allowed = {"score": score_tolerance, "angle": ANGLE_TOLERANCE}
    wrong = sum(
        any(gap > allowed.get(unit, PLACE_TOLERANCE * max(size)) for unit, gap in found.items())
        for found, (_, _, size) in zip(gaps, rows, strict=True)
    )
    score, place, angle = (max((gap[unit] for gap in gaps), default=0.0) for unit in ("score", "place", "angle"))
    detail = f"angles differ by {angle:.2g} radians at the most" if angle else ""
    return Check(name, not wrong, len(rows), wrong, score, place, detail)


def _gaps(what: str, one: Tensor, other: Tensor) -> dict[str, float]:
    """Give the greatest difference of two values of an output, by unit: pixels of a place, scores, radians."""
    columns = columns_of(what)
    if one.shape != other.shape:
        return dict.fromkeys(("score", "place", "angle"), math.inf)
    one, other = (value.double().reshape(-1, len(columns)) for value in (one, other))
    gap = (one - other).abs()
    turned = torch.tensor([column == "angle" for column in columns])
    gap = torch.where(turned, torch.minimum(gap % math.pi, math.pi - gap % math.pi), gap)
    same = (one == other) | (one.isnan() & other.isnan())
    gap = torch.where(same, 0.0, gap.nan_to_num(nan=math.inf))
    units = {"score": ("score",), "place": ("x", "y"), "angle": ("angle",)}
    chosen = {unit: gap[:, [column in of for column in columns]] for unit, of in units.items()}
    return {unit: float(values.max()) if values.numel() else 0.0 for unit, values in chosen.items()}


def _masks_of_raw(name: str, side: Any, again: Detections, size: tuple[int, int]) -> Iterator[Check]:
    """Hold the masks of a file that keeps its raw outputs to those that PyTorch makes of these."""
    if side.raw_masks is None or side.whole.masks is None:
        return
    made = side.whole
    gathered = by_query(side.raw_masks[:1].to(torch.float32), again.queries)
    if made.masks.dtype != torch.bool:
        expected = torch.where(again.valid[..., None, None], gathered, 0.0)
        differing = int((made.masks != expected)[again.valid].flatten(1).any(dim=1).sum())
        yield Check(name, not differing, int(again.valid.sum()), differing, 0.0, 0.0, "compared to the bit")
        return
    plain = Found(again, gathered, made.style, letterboxed=made.letterboxed)
    slots = kept_slots(again.valid[0]).tolist()
    if made.at_image and made.letterboxed is None:
        gaps = [_mask_gap(_mask(made, slot, size), _mask(plain, slot, size)) for slot in slots]
        yield _check_of_masks(name, gaps)


def _mask(found: Found, slot: int, size: tuple[int, int], image: int = 0) -> Tensor:
    """Give the mask of a slot of an image in the image's size."""
    return next(found.masks_of(image, size, torch.arange(found.detections.valid.shape[1]) == slot))[0]


def _mask_gap(one: Tensor, other: Tensor) -> tuple[int, float]:
    """Count the pixels in which masks differ, and give their overlap."""
    union = int((one | other).sum())
    return int((one != other).sum()), int((one & other).sum()) / union if union else 1.0


def _check_of_masks(name: str, gaps: Sequence[tuple[int, float]]) -> Check:
    """Make a check of the gaps of all masks: an IoU of a few pixels says little, so some may always differ."""
    wrong = sum(overlap < LEAST_MASK_IOU and pixels > MOST_MASK_PIXELS for pixels, overlap in gaps)
    equal = sum(pixels == 0 for pixels, _ in gaps)
    lowest = min((overlap for _, overlap in gaps), default=1.0)
    detail = f"{equal} of {len(gaps)} masks equal to the bit, the lowest IoU is {lowest:.4f}"
    return Check(name, not wrong, len(gaps), wrong, 0.0, 0.0, detail)


def _prepare_of(side: Any, reference: Any) -> Any:
    """Give a file that only assumes its preprocessing that of the other side, where that is known; else ``None``."""
    if side.prepare_as is None or reference.prepare_as is not None or reference.preprocessing is None:
        return None
    return side.prepare_as(reference.preprocessing)


def raw_cases(num_queries: int, num_classes: int) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
    """Generate raw outputs that provoke every disagreement known: ties, infinities, NaN, mixed image sizes.

    Args:
        num_queries: Q.
        num_classes: C.

    Yields:
        A name, and logits (B, Q, C), boxes (B, Q, 4), image sizes (B, 2), with B from 1 to 8. The same each time.
    """
    generator = torch.Generator().manual_seed(0)

    def random(batch: int) -> Tensor:
        return torch.randn(batch, num_queries, num_classes, generator=generator) * 2 - 2

    few = random(4)
    mixed = torch.randint(0, 7, (3, num_queries, num_classes), generator=generator)
    values = torch.tensor([0.0, -0.0, 1.0, torch.inf, -torch.inf, torch.finfo().min, torch.finfo().max])
    a_third = torch.rand(3, num_queries, num_classes, generator=generator) < 1 / 3
    mostly_nan = torch.rand(2, num_queries, num_classes, generator=generator) < 0.999
    one_hot = torch.zeros(2, num_queries, num_classes)
    one_hot = torch.where(torch.arange(num_queries * num_classes).view(num_queries, num_classes) == 5, 4.0, one_hot)
    cases = {
        "random": random(1),
        "random, batch 8": random(8),
        "two levels": (few > -2).to(torch.float32),
        "quarter steps": (few * 4).round() / 4,
        "saturated": few * 1000,
        "half precision": few.half().float(),
        "constant": torch.full((2, num_queries, num_classes), -1.5),
        "one-hot": one_hot,
        "infinities and both zeros": values[mixed],
        "all -inf": torch.full((1, num_queries, num_classes), -torch.inf),
        "a third NaN": torch.where(a_third, torch.nan, (random(3) * 4).round() / 4),
        "nearly all NaN": torch.where(mostly_nan, torch.nan, random(2)),
        "all NaN": torch.full((1, num_queries, num_classes), torch.nan),
        "NaN before -inf": torch.cat(
            (torch.full((1, 1, num_classes), torch.nan), torch.full((1, num_queries - 1, num_classes), -torch.inf)), 1
        ),
    }
    sizes = torch.tensor([[480, 640], [640, 480], [1, 1], [1080, 1920], [37, 53], [2000, 11], [333, 333], [720, 1280]])
    for name, logits in cases.items():
        boxes = torch.rand(len(logits), num_queries, 4, generator=generator)
        yield name, (logits, boxes, sizes[: len(logits)])
