"""kornia's RT-DETR by name, with its published weights or those of a file."""

from __future__ import annotations

import contextlib
import io
import re
import warnings

import torch

from detpost.images import Preprocessing
from detpost.integrations.coco_names import names_for
from detpost.integrations.loaded import LoadedDetector
from detpost.integrations.packages import PackageModel
from detpost.integrations.weights import classes_of, in_one_line, put_weights, read_weights
from detpost.spec import DecodeSpec

__all__ = ["VARIANTS", "load"]

VARIANTS = ("rtdetr_r18vd", "rtdetr_r34vd", "rtdetr_r50vd_m", "rtdetr_r50vd", "rtdetr_r101vd")

# RT-DETR's own checkpoints call these parts by other names than kornia's modules do.
_RENAMED = (
    (re.compile(r"^encoder\.(?=(?:pan_blocks|fpn_blocks|downsample_convs|lateral_convs)\.)"), "encoder.ccfm."),
    (re.compile(r"(?<!\.convs)\.(?=branch2[abc]\.)"), ".convs."),
)


def load(model: PackageModel, allow_pickle: bool) -> LoadedDetector:
    """Load one of ``VARIANTS``.

    Args:
        model: its name and weights. A file may have kornia's parameter names or those of RT-DETR's repository, and any
            number of classes.
        allow_pickle: whether a file that is a pickle may be opened. kornia's own weights are pickles that kornia
            fetches and of which it reads tensors alone.

    Returns:
        The detector, which takes images of 640 x 640.

    Raises:
        OSError: weights that cannot be fetched or do not fit.
        ValueError: another name, or a pickle without ``allow_pickle``.
    """
    from kornia.models.rt_detr import RTDETR

    if model.name not in VARIANTS:
        raise ValueError(f"kornia has no {model.name!r}: take one of {', '.join(VARIANTS)}")
    if model.weights is not None:
        weights = {kornias(name): value for name, value in read_weights(model.weights, allow_pickle).items()}
        network = RTDETR.from_name(model.name, classes_of(weights, "enc_score_head.weight", model.weights))
        put_weights(network, weights, model.weights)
    elif model.random:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = RTDETR.from_name(model.name)
    else:
        network = _published(RTDETR, model)
    classes = int(network.decoder.num_classes)
    return LoadedDetector.of_one_size(network, DecodeSpec.preset("rtdetr"), names_for(classes), Preprocessing(640, 640))


def kornias(name: str) -> str:
    """Give the name that kornia's module has for a parameter of RT-DETR's own.

    Example:
        >>> kornias("encoder.pan_blocks.0.conv1.norm.bias"), kornias("blocks.0.branch2a.conv.weight")
        ('encoder.ccfm.pan_blocks.0.conv1.norm.bias', 'blocks.0.convs.branch2a.conv.weight')
    """
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    return name


def _published(network: type, model: PackageModel) -> torch.nn.Module:
    """Let kornia fetch its weights, or say in one line that it could not."""
    # It writes a line and a warning for each place that it tries, and each time.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            found: torch.nn.Module = network.from_pretrained(model.name)  # type: ignore[attr-defined]
        # Of the network, of a file that is damaged, of hashes that differ: its kinds are kornia's own.
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"no weights for {model.source!r}: kornia fetches them over the network, which failed "
                f"({in_one_line(_first_cause(error))}); give a file, {model.source}@FILE, or try without any, "
                f"{model.source}@random"
            ) from error
    return found


def _first_cause(error: BaseException) -> BaseException:
    """Give what an error came from in the end: kornia's own says all that it tried."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
