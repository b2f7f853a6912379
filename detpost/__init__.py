"""Exact, exportable post-processing for DETR-family detectors, and Hausdorff losses, without in-place operations.

Names are loaded when they are used, so that ``detpost --help`` and the pytest plugin do not wait for torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detpost import boxes as boxes
    from detpost import export as export
    from detpost import fusion as fusion
    from detpost import heads as heads
    from detpost import losses as losses
    from detpost import metrics as metrics
    from detpost import nms as nms
    from detpost import purity as purity
    from detpost.detections import Detections as Detections
    from detpost.detector import Detector as Detector
    from detpost.postprocess import DetectionPostProcessor as DetectionPostProcessor
    from detpost.selection import select_top_k as select_top_k
    from detpost.spec import DecodeSpec as DecodeSpec
    from detpost.spec import presets as presets

__version__ = "0.2.0"

_MODULES = ("boxes", "export", "fusion", "heads", "losses", "metrics", "nms", "purity")
_HOMES = {
    "DecodeSpec": "spec",
    "DetectionPostProcessor": "postprocess",
    "Detections": "detections",
    "Detector": "detector",
    "presets": "spec",
    "select_top_k": "selection",
}

__all__ = [
    "DecodeSpec",
    "DetectionPostProcessor",
    "Detections",
    "Detector",
    "boxes",
    "export",
    "fusion",
    "heads",
    "losses",
    "metrics",
    "nms",
    "presets",
    "purity",
    "select_top_k",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"detpost.{name}")
    if name in _HOMES:
        return getattr(import_module(f"detpost.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'detpost' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


# A program that torch.export saved finds the type of its results by this.
if "torch" in sys.modules:
    import_module("detpost.detections")
