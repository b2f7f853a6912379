"""Libraries whose detectors are named ``LIBRARY:MODEL``: a table, and how such a name is read. Imports nothing slow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["PACKAGES", "Package", "PackageModel", "load_package_model", "package_model"]


@dataclass(frozen=True)
class Package:
    """A library that has detectors.

    Args:
        loader: ``"module:function"`` that takes a :class:`PackageModel` and ``allow_pickle`` and gives a
            :class:`detpost.integrations.loaded.LoadedDetector`.
        install: what brings the library.
        example: a name that it knows.
    """

    loader: str
    install: str
    example: str


PACKAGES: Mapping[str, Package] = {
    "kornia": Package("detpost.integrations.load_kornia:load", "pip install kornia", "rtdetr_r18vd"),
    "ultralytics": Package("detpost.integrations.load_ultralytics:load", "pip install ultralytics", "rtdetr-l"),
    "rfdetr": Package("detpost.integrations.load_rfdetr:load", "pip install rfdetr", "nano"),
}

RANDOM = "random"


class PackageModel(NamedTuple):
    """A detector of another library.

    Args:
        source: as it was given.
        package: a name of ``PACKAGES``.
        name: what the library calls the model.
        weights: a file of weights; ``None`` takes those that the library publishes, or random ones.
        random: whether the weights are drawn, always the same ones: to try an export without a download.
    """

    source: str
    package: str
    name: str
    weights: Path | None
    random: bool


def package_model(source: str | Path) -> PackageModel | None:
    """Read ``LIBRARY:MODEL``, ``LIBRARY:MODEL@FILE`` or ``LIBRARY:MODEL@random``.

    Args:
        source: a detector's name.

    Returns:
        What it says; ``None`` for a name of another kind.

    Raises:
        ValueError: a library without a model's name.

    Example:
        >>> package_model("kornia:rtdetr_r18vd@weights.safetensors").weights.name
        'weights.safetensors'
    """
    package, colon, rest = str(source).partition(":")
    if not colon or package not in PACKAGES:
        return None
    name, _, weights = rest.partition("@")
    if not name:
        raise ValueError(f"{source!r} names no model: as {package}:{PACKAGES[package].example}")
    random = weights == RANDOM
    return PackageModel(str(source), package, name, Path(weights) if weights and not random else None, random)


def load_package_model(model: PackageModel, allow_pickle: bool) -> Any:
    """Load a detector of another library, in float32 and evaluation mode, on the CPU.

    Args:
        model: of :func:`package_model`.
        allow_pickle: whether files that are pickles may be opened.

    Returns:
        A :class:`detpost.integrations.loaded.LoadedDetector`.

    Raises:
        ImportError: the library is not installed; the message says how it is.
        OSError: weights that are not there, cannot be fetched or do not fit.
        ValueError: a model that the library does not have, or a pickle without ``allow_pickle``.
    """
    package = PACKAGES[model.package]
    module, function = package.loader.split(":")
    load: Callable[[PackageModel, bool], Any] = getattr(import_module(module), function)
    try:
        return load(model, allow_pickle)
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        brings = package.install if missing == model.package else f"pip install {missing}"
        raise ImportError(f"{model.source!r} needs {missing}: {brings}") from None
