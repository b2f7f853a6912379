"""What is exported: a network with everything that its file should say, and how an export treats it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from detpost.images import Preprocessing
from detpost.postprocess import DetectorModule
from detpost.spec import DecodeSpec

__all__ = ["ExportSource", "evaluating", "first_line"]


@dataclass(frozen=True)
class ExportSource:
    """A network to export and all that its file should say."""

    model: nn.Module
    spec: DecodeSpec
    image_size: tuple[int, int]
    preprocessing: Preprocessing
    class_names: Mapping[int, str]

    @classmethod
    def of(
        cls,
        model: str | Path | nn.Module,
        spec: DecodeSpec | None,
        image_size: tuple[int, int] | None,
        preprocessing: Preprocessing | None,
        class_names: Mapping[int, str] | None,
    ) -> ExportSource:
        """Take whatever a caller names a model by, and fill in what it says of itself.

        Raises:
            ValueError: a plain module without a spec, or a family that no preset covers.
        """
        names = class_names
        if isinstance(model, DetectorModule):
            spec = spec or model.post.spec
            model = model.model
        if isinstance(model, (str, Path)):
            from detpost.integrations.load import load_detector

            loaded = load_detector(model)
            model, preprocessing = loaded.model, preprocessing or loaded.export_preprocessing
            spec, names = spec or loaded.spec, names or loaded.class_names
        elif spec is None:
            spec = _spec_of(model)
        if names is None:
            names = getattr(getattr(model, "config", None), "id2label", None) or {}
        if preprocessing is None:
            preprocessing = Preprocessing(*(image_size or (640, 640)))
        size = image_size or (preprocessing.height, preprocessing.width)
        if size != (preprocessing.height, preprocessing.width):
            preprocessing = replace(preprocessing, height=size[0], width=size[1])
        return cls(model, spec, size, preprocessing, names)


def _spec_of(model: nn.Module) -> DecodeSpec:
    """Pick the spec of a module that says what it is: a transformers detector or kornia's RT-DETR."""
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) is not None:
        return DecodeSpec.from_config(config)
    if type(model).__module__.startswith("kornia.models.rt_detr"):
        return DecodeSpec.preset("rtdetr")
    raise ValueError("a plain module needs a spec: DecodeSpec.preset('rtdetr') for an RT-DETR")


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module and everything in it in evaluation mode for a while."""
    trained = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in trained:
            part.training = True


def first_line(error: BaseException) -> str:
    """Say in one line what went wrong: of the innermost cause, since exporters wrap theirs in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
