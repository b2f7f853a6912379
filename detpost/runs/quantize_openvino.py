"""A detector's OpenVINO file in int8, by NNCF: its decode stays float32, and of the network what has to.

NNCF (Intel's toolkit for OpenVINO) calibrates and places the quantisers; here it is told what to leave alone, and what
comes out is measured in detections. The nodes of the decode are known by their names (``detpost/...``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal

from detpost.detector import Detector
from detpost.export.files import replace_when_whole
from detpost.export.openvino import read_openvino, write_openvino
from detpost.export.source import first_line
from detpost.runs.quantized import Quantized, Truth
from detpost.verify.bisect import Budget
from detpost.verify.changes import compare_detections
from detpost.verify.on_images import OnImages, detect_all

__all__ = ["quantize_openvino"]

_VERSION: Final = 1
_MOST_CALIBRATION_IMAGES: Final = 256
_DECODE: Final = ".*detpost.*"


@dataclass(frozen=True)
class _Step:
    """What NNCF is told, and the words for it.

    Args:
        name: of the step in a recipe.
        kept: what stays float32 beside the decode, for people.
        is_transformer: whether NNCF treats the network as a transformer, whose attention it handles with care.
        types: operators of OpenVINO that stay float32.
        weights_alone: whether int8 weights are multiplied in float32.
    """

    name: str
    kept: str
    is_transformer: bool = False
    types: tuple[str, ...] = ()
    weights_alone: bool = False


# From the fewest bits to the most.
_STEPS: Final = (
    _Step("all", "nothing of the network"),
    _Step("transformer", "what NNCF leaves out of a transformer", is_transformer=True),
    _Step("no-products", "the network's products of matrices", types=("MatMul",)),
    _Step("weights", "all of the network's arithmetic", weights_alone=True),
)


def quantize_openvino(
    model: Path,
    out: Path,
    images: Sequence[str | Path],
    *,
    keep: Literal["auto"] | Sequence[str],
    max_loss: float,
    annotations: str | Path | None,
    threshold: float,
    symmetric: bool,
    recipe: str | Path | None,
    budget: float | None,
    progress: Callable[[str], None] | None,
    tell: Callable[[int, int], None] | None,
) -> Quantized:
    """Write an ``.xml`` file in int8; its post-processing stays float32.

    Args:
        model: an ``.xml`` file of detpost's in float32.
        out: the ``.xml`` file to write.
        images: as for :func:`detpost.runs.quantize.quantize`; to repeat a recipe, too, since NNCF calibrates anew.
        keep: names of nodes of the file that stay float32, or ``"auto"``: of four steps the one of the fewest bits that
            loses no more than ``max_loss``.
        max_loss: as for ``quantize``.
        annotations: likewise.
        threshold: likewise.
        symmetric: zero points of 0 throughout.
        recipe: a recipe to repeat: its step or names, and ``symmetric``.
        budget: seconds after which no further step is begun.
        progress: called with one line before each step.
        tell: called with the number of steps that were run and that there may be.

    Returns:
        What was written.

    Raises:
        ImportError: nncf or openvino is missing; the message names the extra.
        OSError: a file that is missing or cannot be read.
        ValueError: no images, a file that detpost did not write, a node that does not exist, or a loss that is too
            great at every step.

    Source:
        NNCF's post-training quantisation (``nncf.quantize``).
    """
    say = progress or (lambda _: None)
    _import_nncf()
    source, metadata = read_openvino(model)
    if "quantized" in metadata:
        raise ValueError(f"{model} is in int8 already: start from its float32 file")
    if not images:
        raise ValueError("no images to calibrate on: name a folder of some with --calibrate")
    on_images = OnImages(model, [Path(image) for image in images])
    truth = None if annotations is None else Truth(Path(annotations), on_images)
    say(f"running the float file on {len(on_images.images)} images")
    expected = on_images.detect()
    before = 0.0 if truth is None else truth.precision(expected)

    def loss_of(written: Path) -> float:
        found = detect_all(Detector.load(written, threshold=0.0), on_images.images)
        if truth is None:
            return compare_detections(expected, found, threshold).loss
        return before - truth.precision(found)

    steps: list[_Step] = list(_STEPS)
    names: tuple[str, ...] = ()
    if recipe is not None:
        steps, names, symmetric = _read_recipe(Path(recipe))
    elif keep != "auto":
        steps, names = [_Step("names", f"{len(keep)} nodes of the network")], tuple(keep)
    is_search = recipe is None and keep == "auto"
    spent = Budget(budget)
    losses: list[float] = []
    for count, step in enumerate(steps):
        say(f"int8, keeping {step.kept} and the decode")
        made = _quantized(source, on_images, step, names, symmetric)
        said = {**metadata, "quantized": {"precision": "int8", "by": "nncf", "step": step.name, "symmetric": symmetric}}
        with tempfile.TemporaryDirectory(prefix="detpost-") as folder:
            loss = loss_of(write_openvino(made, Path(folder) / "trial.xml", said).path)
        losses.append(loss)
        if tell is not None:
            tell(count + 1, len(steps))
        if not is_search or loss <= max_loss:
            break
        if spent.left <= 0:
            raise ValueError(f"the budget is spent at a loss of {loss:.4f}: above the {max_loss:g} allowed")
    else:
        told = ", ".join(f"{each:.4f} keeping {step.kept}" for each, step in zip(losses, steps, strict=True))
        raise ValueError(f"{_measure(truth)} lost is above {max_loss:g} at every step: {told}")
    say("writing the file")
    notes = tuple(_notes(truth, before, loss, losses[0], len(on_images.images), step, max_loss))
    written = write_openvino(made, out, said, notes)
    beside = out.with_name(f"{out.stem}.recipe.json")
    with replace_when_whole(beside) as temporary:
        told_again = {
            "recipe": _VERSION,
            "by": "nncf",
            "precision": "int8",
            "symmetric": symmetric,
            "step": step.name,
            "float_nodes": list(names),
            "source": {"name": model.name, "sha256": hashlib.sha256(model.read_bytes()).hexdigest()},
            "measured": {"of": _measure(truth), "loss": loss, "all_lowered": losses[0], "images": len(images)},
        }
        temporary.write_text(json.dumps(told_again, indent=1) + "\n", encoding="utf-8")
    return Quantized(
        written=written,
        recipe=beside,
        precision="int8",
        measure=_measure(truth),
        loss=loss,
        all_lowered=losses[0],
        float_nodes=names,
        weight_nodes=(),
        size=_bytes(out) / _bytes(model),
    )


def _quantized(source: Any, on_images: OnImages, step: _Step, names: tuple[str, ...], symmetric: bool) -> Any:
    nncf = _import_nncf()
    every = max(1, len(on_images.images) // _MOST_CALIBRATION_IMAGES)
    batches = list(islice(on_images.arrays(), 0, None, every))
    known = {node.get_friendly_name() for node in source.get_ops()}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"the file has no node {unknown[0]!r}, nor {len(unknown) - 1} others that were named")
    # Not every network has each of these.
    ignored = nncf.IgnoredScope(names=list(names), types=list(step.types), patterns=[_DECODE], validate=False)
    try:
        if step.weights_alone:
            mode = nncf.CompressWeightsMode.INT8_SYM if symmetric else nncf.CompressWeightsMode.INT8_ASYM
            return nncf.compress_weights(source.clone(), mode=mode, ignored_scope=ignored)
        return nncf.quantize(
            source.clone(),
            nncf.Dataset(batches),
            preset=nncf.QuantizationPreset.PERFORMANCE if symmetric else nncf.QuantizationPreset.MIXED,
            subset_size=len(batches),
            model_type=nncf.ModelType.TRANSFORMER if step.is_transformer else None,
            ignored_scope=ignored,
        )
    except Exception as error:
        raise ValueError(f"NNCF does not take the file: {first_line(error)}") from error


def _measure(truth: Truth | None) -> str:
    return "matched detections" if truth is None else "AP"


def _notes(
    truth: Truth | None, before: float, loss: float, first: float, images: int, step: _Step, max_loss: float
) -> Iterator[str]:
    of = "" if truth is None else f" of {before:.4f}"
    more = "" if step.name == "all" else f" ({first:.4f} at the first step)"
    yield f"{_measure(truth)} lost on {images} images: {loss:.4f}{of}{more}"
    yield f"kept: the decode in float32, and {step.kept}"
    if loss > max_loss:
        yield f"that is more than the {max_loss:g} allowed: --keep auto finds what to keep"


def _read_recipe(path: Path) -> tuple[list[_Step], tuple[str, ...], bool]:
    if not path.is_file():
        raise FileNotFoundError(f"no recipe {path}")
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        if said["recipe"] != _VERSION or said["by"] != "nncf":
            raise ValueError
        names = tuple(map(str, said["float_nodes"]))
        known = {step.name: step for step in (*_STEPS, _Step("names", f"{len(names)} nodes of the network"))}
        return [known[said["step"]]], names, bool(said["symmetric"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is not a recipe of `detpost quantize` for .xml files, of this version") from None


def _bytes(path: Path) -> int:
    return path.stat().st_size + path.with_suffix(".bin").stat().st_size


def _import_nncf() -> Any:
    try:
        import nncf
    except ImportError as error:
        raise ImportError("int8 of OpenVINO's files needs nncf: pip install 'detpost[quantize]'") from error
    nncf.set_log_level(logging.ERROR)
    return nncf
