"""Ultralytics' RT-DETR by name, with its published weights or those of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detpost.images import Preprocessing
from detpost.integrations.coco_names import names_for
from detpost.integrations.loaded import LoadedDetector
from detpost.integrations.packages import PackageModel
from detpost.integrations.weights import check_pickle, classes_of, in_one_line, put_weights, read_weights
from detpost.spec import DecodeSpec

__all__ = ["load"]


def load(model: PackageModel, allow_pickle: bool) -> LoadedDetector:
    """Load an RT-DETR of Ultralytics.

    Args:
        model: ``rtdetr-l``, ``rtdetr-x`` or the path of a ``.pt`` or ``.yaml`` file (a description without weights).
        allow_pickle: whether pickles may be opened: its published weights and ``.pt`` files are whole Python objects.

    Returns:
        The detector, which takes images at the size that it was trained at.

    Raises:
        OSError: weights that cannot be fetched or do not fit.
        ValueError: a pickle without ``allow_pickle``, or another kind of network.
    """
    import ultralytics  # noqa: F401  # missing, it is named before anything else is said

    if model.name.endswith((".yaml", ".yml")) or model.random:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = _described(model, None)
    elif model.weights is not None and model.weights.suffix == ".safetensors":
        weights = read_weights(model.weights, allow_pickle)
        network = _described(model, classes_of(weights, "enc_score_head.weight", model.weights))
        put_weights(network, weights, model.weights)
    else:
        network = _unpickled(model, allow_pickle)
    head = network.model[-1]
    if type(head).__name__ != "RTDETRDecoder":
        raise ValueError(f"{model.source!r} is no RT-DETR: it ends in {type(head).__name__}")
    size = int(dict(getattr(network, "args", None) or {}).get("imgsz") or 640)
    own = {int(label): str(name) for label, name in (getattr(network, "names", None) or {}).items()}
    told = {label: name for label, name in own.items() if name != str(label)}  # without weights it names 0 "0"
    return LoadedDetector.of_one_size(
        _RawOutputs(network), DecodeSpec.preset("rtdetr"), told or names_for(int(head.nc)), Preprocessing(size, size)
    )


class _RawOutputs(nn.Module):
    """Images to (logits, boxes) of the last layer, which its head gives beside its own detections."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        _, (boxes, logits, *_) = self.network(images)
        return logits[-1], boxes[-1]  # (L, B, Q, C), (L, B, Q, 4)


def _described(model: PackageModel, classes: int | None) -> Any:
    from ultralytics.nn.tasks import RTDETRDetectionModel

    name = model.name if model.name.endswith((".yaml", ".yml")) else f"{Path(model.name).stem}.yaml"
    try:
        return RTDETRDetectionModel(name, nc=classes, verbose=False).eval()
    except FileNotFoundError:
        raise ValueError(f"ultralytics has no {model.name!r}: take rtdetr-l or rtdetr-x, or a file") from None


def _unpickled(model: PackageModel, allow_pickle: bool) -> Any:
    from ultralytics import RTDETR

    file = model.weights or Path(model.name if model.name.endswith(".pt") else f"{model.name}.pt")
    if model.weights is not None and not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    check_pickle(f"{file} of ultralytics", allow_pickle)
    try:
        return RTDETR(str(file)).model.float().eval()
    # It raises its own kinds of error for a download that fails and for files of other kinds.
    except Exception as error:
        raise OSError(
            f"no weights for {model.source!r}: ultralytics could not load {file} ({in_one_line(error)})"
        ) from error
