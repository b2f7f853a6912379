"""RF-DETR by name, with its published weights or those of a file."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from detpost.images import Preprocessing
from detpost.integrations.loaded import LoadedDetector
from detpost.integrations.packages import PackageModel
from detpost.integrations.weights import check_pickle, classes_of, in_one_line, put_weights, read_weights
from detpost.spec import DecodeSpec

__all__ = ["load"]

_VARIANTS = {name.lower(): f"RFDETR{name}" for name in ("Nano", "Small", "Medium", "Base", "Large")}
_VARIANTS |= {f"seg-{name.lower()}": f"RFDETRSeg{name}" for name in ("Nano", "Small", "Medium", "Large")}
_COCO_CHANNELS = 91  # COCO's category ids from 0 to 90


def load(model: PackageModel, allow_pickle: bool) -> LoadedDetector:
    """Load RF-DETR ``nano``, ``small``, ``medium``, ``base`` or ``large``, or ``seg-nano`` to ``seg-large`` with masks.

    Args:
        model: its name and weights. A file of weights may have any number of classes.
        allow_pickle: whether a file that is a pickle may be opened. RF-DETR's own weights are pickles that it fetches
            and of which it reads tensors and settings alone.

    Returns:
        The detector, which takes images at the variant's own size.

    Raises:
        OSError: weights that cannot be fetched or do not fit.
        ValueError: another name, or a pickle without ``allow_pickle``.
    """
    import rfdetr

    kind = getattr(rfdetr, _VARIANTS.get(model.name.removeprefix("rf-detr-"), ""), None)
    if kind is None:
        raise ValueError(f"rfdetr has no {model.name!r}: take one of {', '.join(_VARIANTS)}")
    with _quiet():
        whole = _loaded(kind, model, allow_pickle)
    network, size = whole.model.model.float().eval(), int(whole.model.resolution)
    mean, std = (tuple(map(float, values)) for values in (whole.means, whole.stds))
    loaded = LoadedDetector.of_one_size(
        _RawOutputs(network),
        DecodeSpec.preset("rfdetr"),
        _class_names(whole, int(network.class_embed.out_features)),
        Preprocessing(size, size, mean=mean, std=std),  # type: ignore[arg-type]
    )
    return replace(loaded, gives_masks=model.name.removeprefix("rf-detr-").startswith("seg-"))


class _RawOutputs(nn.Module):
    """Images to logits, boxes and perhaps masks, by the way through the network that it takes for its own exports."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        network.export()
        self.network = network

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        boxes, logits, *masks = self.network(images)
        found = {"pred_logits": logits, "pred_boxes": boxes}
        return {**found, "pred_masks": masks[0]} if masks and masks[0] is not None else found


def _loaded(kind: Any, model: PackageModel, allow_pickle: bool) -> Any:
    if model.weights is not None and model.weights.suffix == ".safetensors":
        weights = read_weights(model.weights, allow_pickle)
        channels = classes_of(weights, "class_embed.weight", model.weights)
        whole = kind(pretrain_weights=None, num_classes=channels - 1, device="cpu")
        put_weights(whole.model.model, weights, model.weights)
        return whole
    if model.random:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return kind(pretrain_weights=None, device="cpu")
    given = {}
    if model.weights is not None:
        check_pickle(str(model.weights), allow_pickle)
        given = {"pretrain_weights": str(model.weights)}
    try:
        return kind(device="cpu", **given)
    # It raises its own kinds of error for a download that fails and for files of other kinds.
    except Exception as error:
        raise OSError(f"no weights for {model.source!r}: rfdetr could not load them ({in_one_line(error)})") from error


def _class_names(whole: Any, channels: int) -> dict[int, str]:
    """Name the labels: its COCO weights number them as COCO does, others from 0."""
    if channels == _COCO_CHANNELS:
        from rfdetr.assets.coco_classes import COCO_CLASSES

        return {int(label): str(name) for label, name in COCO_CLASSES.items()}
    return dict(enumerate(map(str, whole.class_names or ())))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep its remarks on weights that it does not load off the terminal."""
    logger = logging.getLogger("rf-detr")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
