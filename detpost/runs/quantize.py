"""A detector in fewer bits with the same detections: what stays float is found by what it does to them."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from detpost.export.artifact import finish, read_metadata
from detpost.export.files import replace_when_whole
from detpost.export.layouts import recorded_layout
from detpost.export.lowering import PRECISIONS, Precision, calibrate, lower, lowerable, prepared
from detpost.export.mixed import Mixture
from detpost.export.rounded import fewer_bits, written_out
from detpost.export.source import first_line
from detpost.runs.quantized import Quantized, Truth
from detpost.verify.bisect import Budget, Measured, OutOfBudgetError, needed
from detpost.verify.changes import compare_detections, disagreement
from detpost.verify.diagnose import load_model
from detpost.verify.on_images import OnImages
from detpost.verify.suspects import suspects

if TYPE_CHECKING:
    import onnx


__all__ = ["Quantized", "quantize"]

_VERSION = 1
_MOST_CALIBRATION_IMAGES = 256
# What of the allowed loss is spent on the images at hand; the rest is for those that are not.
_SPENT = 0.5
# What of a step's gain a part of it must bring, so that it is no accident of the images.
_SHARE_OF_GAIN = 0.75


@dataclass(frozen=True)
class _Plan:
    """What a file in fewer bits is made by."""

    precision: Precision
    float_nodes: tuple[str, ...] = ()
    weight_nodes: tuple[str, ...] = ()
    ranges: dict[str, tuple[float, float]] | None = None
    symmetric: bool = False


def quantize(
    model: str | Path,
    out: str | Path,
    precision: Precision = "int8",
    images: Sequence[str | Path] = (),
    *,
    keep: Literal["auto"] | Sequence[str] = "auto",
    max_loss: float = 0.005,
    annotations: str | Path | None = None,
    threshold: float = 0.5,
    symmetric: bool = False,
    recipe: str | Path | None = None,
    budget: float | None = None,
    progress: Callable[[str], None] | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> Quantized:
    """Write a detector in fewer bits; its post-processing stays float32.

    Args:
        model: an ``.onnx`` file of detpost's in float32, or what :func:`detpost.export.to_onnx` takes; or an ``.xml``
            file, which NNCF makes one of int8 (:mod:`detpost.runs.quantize_openvino`).
        out: the ``.onnx`` file to write, ``.xml`` of an ``.xml`` file; beside it the recipe, ``NAME.recipe.json``.
        precision: ``"int8"``: QDQ, weights per channel; ``"fp16"``; ``"bf16"``.
        images: files of images to calibrate and measure on, a hundred or more, of the kind that the detector will see.
        keep: names of nodes of the network that stay float32, or ``"auto"``: none if the loss allows, else those that a
            search finds. With int8, products (MatMul, Gemm) then have int8 weights and float32 arithmetic.
        max_loss: of AP, or of matched detections; half of it is spent on ``images`` where that can be had.
        annotations: a COCO ground truth of the images; without it, the share of detections without a partner in the
            other version's (the same class, IoU of at least 0.75) is the loss.
        threshold: without ground truth, detections with ``score > threshold`` are matched.
        symmetric: with int8, zero points of 0 and int8 activations, which TensorRT asks for.
        recipe: a recipe to repeat, to the bit, without images: it says all but ``model`` and ``out``.
        budget: seconds that the search may take.
        progress: called with one line before each step.
        tell: called with the number of runs that the search has made and may need.

    Returns:
        What was written.

    Raises:
        ImportError: onnx, onnxruntime or nncf is missing; the message names the extra.
        OSError: a file that is missing or cannot be read.
        ValueError: no images, a file that is no whole float32 detector of detpost's, a node that does not exist, or a
            loss that is too great with everything kept that may be.
    """
    say = progress or (lambda _: None)
    if Path(model).suffix == Path(out).suffix == ".xml":
        from detpost.runs.quantize_openvino import quantize_openvino

        if precision != "int8":
            raise ValueError(
                f"an .xml file becomes int8; got {precision!r}: convert an .onnx file of {precision} by `to_openvino`"
            )
        return quantize_openvino(
            Path(model),
            Path(out),
            images,
            keep=keep,
            max_loss=max_loss,
            annotations=annotations,
            threshold=threshold,
            symmetric=symmetric,
            recipe=recipe,
            budget=budget,
            progress=progress,
            tell=tell,
        )
    if Path(out).suffix != ".onnx":
        raise ValueError(
            f"quantize writes .onnx files, and .xml files of .xml files; got {model} and {out}: "
            "OpenVINO takes an .onnx file of int8 by `to_openvino(FILE.onnx, FILE.xml)`, too"
        )
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: take one of {', '.join(PRECISIONS)}")
    with tempfile.TemporaryDirectory(prefix="detpost-") as folder:
        path = _float_file(model, Path(folder), say)
        source = load_model(path)
        metadata = read_metadata({entry.key: entry.value for entry in source.metadata_props}, path)
        if fewer_bits(source):
            raise ValueError(f"{path} is in {', '.join(fewer_bits(source))} already: start from its float32 file")
        if recipe is not None:
            say("repeating the recipe")
            return _write(source, metadata, path, Path(out), _read_recipe(Path(recipe)), None)
        search = _Search(source, path, precision, images, annotations, max_loss, threshold, symmetric, Budget(budget))
        plan = search.plan(keep, say, tell)
        say("writing the file")
        return _write(source, metadata, path, Path(out), plan, search)


def _float_file(model: str | Path, folder: Path, say: Callable[[str], None]) -> Path:
    if Path(model).suffix == ".onnx":
        return Path(model)
    if Path(model).suffix in (".xml", ".pt2"):
        raise ValueError(
            f"quantize takes an .onnx file or a model to export; got {model}: give the .onnx file it is of"
        )
    from detpost.export import to_onnx

    return to_onnx(model, folder / "float.onnx", progress=say).path


class _Search:
    """A float file, images, and the loss that a plan has on them."""

    def __init__(
        self,
        source: onnx.ModelProto,
        path: Path,
        precision: Precision,
        images: Sequence[str | Path],
        annotations: str | Path | None,
        max_loss: float,
        threshold: float,
        symmetric: bool,
        budget: Budget,
    ) -> None:
        if not images:
            raise ValueError("no images to calibrate on: name a folder of some with --calibrate")
        self.model, self.precision, self.symmetric = prepared(source), precision, symmetric
        self.threshold, self.max_loss, self.budget = threshold, max_loss, budget
        self.on_images = OnImages(path, [Path(image) for image in images])
        self.truth = None if annotations is None else Truth(Path(annotations), self.on_images)
        self.ranges: dict[str, tuple[float, float]] = {}
        self.units = lowerable(self.model, precision)
        self.measured: float | None = None
        self.all_lowered: float | None = None
        self.complete = True

    @property
    def measure(self) -> str:
        """What the loss is of."""
        return "matched detections" if self.truth is None else "AP"

    def plan(
        self, keep: Literal["auto"] | Sequence[str], say: Callable[[str], None], tell: Callable[[int, int], None] | None
    ) -> _Plan:
        """Decide what stays float."""
        say(f"running the float file on {len(self.on_images.images)} images")
        self.expected = self.on_images.detect()
        self.before = 0.0 if self.truth is None else self.truth.precision(self.expected)
        if self.precision == "int8":
            step = max(1, len(self.on_images.images) // _MOST_CALIBRATION_IMAGES)
            say(f"calibrating on {min(len(self.on_images.images), _MOST_CALIBRATION_IMAGES)} of them")
            self.ranges = calibrate(self.model, islice(self.on_images.arrays(), 0, None, step))
        if keep != "auto":
            plan = self._plan(tuple(keep), ())
            self.measured = self._loss(self._detect(plan))
            return plan
        return self._search(say, tell)

    def _search(self, say: Callable[[str], None], tell: Callable[[int, int], None] | None) -> _Plan:
        told = None if tell is None else lambda runs: tell(runs, max(runs, _runs_ahead(len(self.units))))
        # The key of a set is the nodes that are kept in full, and with a mark before them those of int8 weights.
        self.apart: dict[frozenset[str], float] = {}
        asked = Measured(self._loss_of, self.budget, progress=told)
        say(f"measuring with all {len(self.units)} nodes in {self.precision}")
        self.all_lowered = self.measured = asked(())
        if self.all_lowered <= self.max_loss and not self._weights_first:
            return self._plan((), ())
        say(
            f"{self.measure} lost: {self.all_lowered:.4f}; searching what to keep, at most about "
            f"{_runs_ahead(len(self.units))} runs of {asked.slowest:.1f} s"
        )
        chosen = next((found for step in self._ladder() if (found := self._reduce(*step, asked)) is not None), None)
        if chosen is None:
            raise ValueError(
                f"{self.measure} lost is above {self.max_loss:g} with the whole network kept: the images are too few, "
                "or the file differs from itself between runs"
            )
        self.measured = asked(chosen)
        return self._plan_of(chosen)

    @property
    def _weights_first(self) -> bool:
        """Whether products are int8 in their weights alone from the start: that saves most of the loss.

        TensorRT, which symmetric files are for, has no such products.
        """
        return self.precision == "int8" and not self.symmetric

    def _ladder(self) -> Iterator[tuple[list[str], float]]:
        """Give what may be kept, and to which loss: step by step products' int8 weights, all weights, float."""
        operators = {node.name: node.op_type for node in self.model.graph.node}
        if self._weights_first:
            products = [_WEIGHTS + name for name in self.units if operators[name] != "Conv"]
            weights = [_WEIGHTS + name for name in self.units]
            for goal in (self.max_loss * _SPENT, self.max_loss):
                yield from ((products, goal), (weights, goal))
        yield list(self.units), self.max_loss

    def _reduce(self, units: Sequence[str], goal: float, asked: Measured) -> frozenset[str] | None:
        """Find a small part of the units that is enough: by module, float ones by node; ``None`` where all are not."""

        def enough(kept: frozenset[str]) -> bool:
            try:
                return asked(kept) <= goal
            except OutOfBudgetError:
                self.complete = False
                return False

        everything = frozenset(units)
        if not enough(everything):
            # Out of time before anything was found: what is kept whole is right, if large.
            return everything if not self.complete and not any(u.startswith(_WEIGHTS) for u in units) else None
        convolutions = {node.name for node in self.model.graph.node if node.op_type == "Conv"}
        if all(unit.startswith(_WEIGHTS) and unit.removeprefix(_WEIGHTS) not in convolutions for unit in units):
            return everything
        most = self.apart[everything] + (1 - _SHARE_OF_GAIN) * (self.apart[frozenset()] - self.apart[everything])

        def as_good(kept: frozenset[str]) -> bool:
            return enough(kept) and self.apart[kept] <= max(most, self.apart[everything])

        ranked = [unit for name in self.ranked for unit in (name, _WEIGHTS + name) if unit in everything]
        size = _least(len(ranked), lambda size: as_good(frozenset(ranked[:size])))
        left = [unit for unit in units if unit in set(ranked[:size])]
        if any(unit.startswith(_WEIGHTS) for unit in units):  # costs little: not worth a search by node
            return frozenset(left)
        return frozenset(needed(left, lambda _, part: as_good(part)))

    @functools.cached_property
    def ranked(self) -> tuple[str, ...]:
        """The nodes that may be in fewer bits, those first whose rounding adds most error."""
        mixture = Mixture(self.model, _lowered(self.model, self._plan((), ())))
        found = suspects(mixture, self.on_images.path, self.on_images.images)
        return tuple(dict.fromkeys([*(name for name in found if name in self.units), *self.units]))

    def _plan_of(self, kept: frozenset[str]) -> _Plan:
        weights = {name.removeprefix(_WEIGHTS) for name in kept if name.startswith(_WEIGHTS)}
        return self._plan(
            tuple(name for name in self.units if name in kept), tuple(name for name in self.units if name in weights)
        )

    def _plan(self, float_nodes: tuple[str, ...], weight_nodes: tuple[str, ...]) -> _Plan:
        return _Plan(self.precision, float_nodes, weight_nodes, self.ranges or None, self.symmetric)

    def _loss_of(self, kept: frozenset[str]) -> float:
        found = self._detect(self._plan_of(kept))
        self.apart = {**self.apart, kept: disagreement(self.expected, found, self.threshold)}
        return self._loss(found)

    def _detect(self, plan: _Plan) -> list[dict[str, Any]]:
        return self.on_images.detect(written_out(_lowered(self.model, plan)))

    def _loss(self, found: list[dict[str, Any]]) -> float:
        if self.truth is None:
            return compare_detections(self.expected, found, self.threshold).loss
        return self.before - self.truth.precision(found)


_WEIGHTS = "weights of "


def _runs_ahead(units: int) -> int:
    """Guess how many runs a search by module and then by node may take."""
    return 30 + 4 * units.bit_length()


def _least(most: int, enough: Callable[[int], bool]) -> int:
    """Give the least size that is enough, by doubling and halving; ``most`` is known to be."""
    high = 1
    while high < most and not enough(high):
        high = high * 2
    low, high = high // 2, min(high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _lowered(model: onnx.ModelProto, plan: _Plan) -> onnx.ModelProto:
    return lower(
        model,
        plan.precision,
        float_nodes=plan.float_nodes,
        weight_nodes=plan.weight_nodes,
        ranges=plan.ranges,
        symmetric=plan.symmetric,
    )


def _write(
    source: onnx.ModelProto, metadata: dict[str, Any], path: Path, out: Path, plan: _Plan, search: _Search | None
) -> Quantized:
    model = prepared(source)
    try:
        made = _lowered(model, plan)
    except KeyError as error:
        raise ValueError(f"the recipe is of another file: it has no range of {first_line(error)}") from None
    said = {name: value for name, value in metadata.items() if name not in ("version", "opset")}
    bits = {
        "precision": plan.precision,
        "float_nodes": len(plan.float_nodes),
        "weight_nodes": len(plan.weight_nodes),
        "symmetric": plan.symmetric,
    }
    written = finish(
        made,
        out,
        {**said, "quantized": bits},
        layout=recorded_layout(metadata),
        exporter=str(metadata.get("exporter", "quantize")),
        notes=tuple(_notes(plan, search)),
        folder=out.parent,
    )
    loss = None if search is None else search.measured
    beside = out.with_name(f"{out.stem}.recipe.json")
    with replace_when_whole(beside) as temporary:
        temporary.write_text(json.dumps(_recipe(model, path, plan, search), indent=1) + "\n", encoding="utf-8")
    return Quantized(
        written=written,
        recipe=beside,
        precision=plan.precision,
        measure="" if search is None else search.measure,
        loss=loss,
        all_lowered=None if search is None else search.all_lowered,
        float_nodes=plan.float_nodes,
        weight_nodes=plan.weight_nodes,
        size=out.stat().st_size / path.stat().st_size,
        complete=search is None or search.complete,
    )


def _notes(plan: _Plan, search: _Search | None) -> Iterator[str]:
    if search is None or search.measured is None:
        return
    kept = [f"{len(plan.float_nodes)} nodes of the network in float32"] if plan.float_nodes else []
    kept += [f"{len(plan.weight_nodes)} with int8 weights alone"] if plan.weight_nodes else []
    before = "" if search.truth is None else f" of {search.before:.4f}"
    all_lowered = "" if search.all_lowered is None or not kept else f" ({search.all_lowered:.4f} with none kept)"
    yield f"{search.measure} lost on {len(search.on_images.images)} images: {search.measured:.4f}{before}{all_lowered}"
    yield f"kept: the decode in float32{''.join(f', {each}' for each in kept)}"
    if not search.complete:
        yield "the budget is spent: more may be kept than needed"
    if search.measured > search.max_loss:
        yield f"that is more than the {search.max_loss:g} allowed: --keep auto finds what to keep"


def _recipe(model: onnx.ModelProto, path: Path, plan: _Plan, search: _Search | None) -> dict[str, Any]:
    """Give what repeats a file, and how TensorRT is told the same of the float file."""
    lowered = set(lowerable(model, plan.precision)) - {*plan.float_nodes}
    kept = [node.name for node in model.graph.node if node.name and node.name not in lowered]
    kind = {"int8": "int8", "fp16": "fp16", "bf16": "bf16"}[plan.precision]
    return {
        "recipe": _VERSION,
        "precision": plan.precision,
        "symmetric": plan.symmetric,
        "float_nodes": list(plan.float_nodes),
        "weight_nodes": list(plan.weight_nodes),
        "ranges": {name: list(ends) for name, ends in (plan.ranges or {}).items()} or None,
        "source": {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
        "measured": None
        if search is None
        else {
            "of": search.measure,
            "loss": search.measured,
            "all_lowered": search.all_lowered,
            "images": len(search.on_images.images),
        },
        "tensorrt": {
            "flags": [f"--{kind}", "--precisionConstraints=obey"],
            "layer_precisions": {name: "fp32" for name in kept},
        },
    }


def _read_recipe(path: Path) -> _Plan:
    if not path.is_file():
        raise FileNotFoundError(f"no recipe {path}")
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        if said["recipe"] != _VERSION or said["precision"] not in PRECISIONS:
            raise ValueError
        ranges = {name: (float(low), float(high)) for name, (low, high) in (said["ranges"] or {}).items()} or None
        nodes = tuple(said["float_nodes"]), tuple(said["weight_nodes"])
        return _Plan(said["precision"], *nodes, ranges, bool(said["symmetric"]))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is not a recipe of this version of `detpost quantize`") from None
