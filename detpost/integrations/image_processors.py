"""In place of ``post_process_object_detection`` of transformers' image processors: the same call, the same results.

Import it from :mod:`detpost.integrations.transformers`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from detpost import kernels
from detpost.detections import split_by_image
from detpost.integrations.conventions import (
    KindError,
    MisfitError,
    check_outputs,
    check_threshold,
    in_query_order,
    size_rows,
)
from detpost.postprocess import DetectionPostProcessor
from detpost.spec import DecodeSpec

__all__ = ["patched", "post_process_object_detection"]

_Processor = TypeVar("_Processor")
_METHOD = "post_process_object_detection"
_NAMES = ("scores", "labels", "boxes")


@dataclass(frozen=True)
class _Decode:
    """What one image processor's method does, beside decoding: its arguments, its defaults, how it scales."""

    preset: str
    threshold: float = 0.5
    top_k: int | None = None  # None: as many as there are queries
    takes: tuple[str, ...] = ()  # beside outputs, threshold and target_sizes
    square: bool = False  # the image was padded to a square, so boxes are in units of its longer side


_DECODES: dict[str, _Decode] = {
    "Detr": _Decode("detr"),
    "Yolos": _Decode("yolos"),
    "RTDetr": _Decode("rtdetr", takes=("use_focal_loss",)),
    "RfDetr": _Decode("rfdetr", takes=("top_k",)),
    "ConditionalDetr": _Decode("conditional_detr", top_k=100, takes=("top_k",)),
    "DeformableDetr": _Decode("deformable_detr", top_k=100, takes=("top_k",)),
    "OwlViT": _Decode("owlvit", threshold=0.1),
    "Owlv2": _Decode("owlv2", threshold=0.1, square=True),
    "GroundingDino": _Decode("grounding_dino", threshold=0.1),
}

# The processor of each model_type; `-` as `_`, as the library names its folders.
_PROCESSOR_OF: dict[str, str] = {
    "detr": "Detr",
    "table_transformer": "Detr",
    "yolos": "Yolos",
    "rt_detr": "RTDetr",
    "rt_detr_v2": "RTDetr",
    "d_fine": "RTDetr",
    "deimv2": "RTDetr",
    "rf_detr": "RfDetr",
    "conditional_detr": "ConditionalDetr",
    "dab_detr": "ConditionalDetr",
    "deformable_detr": "DeformableDetr",
    "lw_detr": "DeformableDetr",
    "owlvit": "OwlViT",
    "owlv2": "Owlv2",
    "grounding_dino": "GroundingDino",
    "mm_grounding_dino": "GroundingDino",
}


def post_process_object_detection(
    outputs: Any,
    threshold: float | None = None,
    target_sizes: Tensor | Sequence[Any] | None = None,
    top_k: int | None = None,
    *,
    use_focal_loss: bool = True,
    family: Any = None,
) -> list[dict[str, Tensor]]:
    """Decode the outputs of a transformers detector as its own image processor does.

    Args:
        outputs: what the model returned: ``logits`` (B, Q, C) and ``pred_boxes`` (B, Q, 4) as attributes.
        threshold: keep ``score > threshold``; ``None`` takes the processor's default (0.5, text-conditioned 0.1).
        target_sizes: (height, width) in pixels of each image, a tensor (B, 2) or a list of pairs; ``None`` leaves boxes
            normalised. OWLv2 pads images to a square and takes the size of the image before that.
        top_k: for the processors that take one (Conditional, DAB, Deformable, LW-DETR: 100; RF-DETR: all queries).
        use_focal_loss: for RT-DETR and the families that follow it; ``False`` decodes with a softmax over the classes.
        family: whose decode it is, where ``outputs`` are not the library's own class: an image processor, a config, a
            model or a ``model_type``.

    Returns:
        For each image ``scores`` (D,), ``labels`` (D,) and ``boxes`` (D, 4), xyxy. Best first, or in the order of the
        queries where the library keeps that (DETR, Table Transformer, YOLOS, OWL-ViT, OWLv2, Grounding DINO).

    Raises:
        TypeError: a family that cannot be told or is not covered, an argument that its processor does not take, or
            outputs of another kind (an ``AttributeError`` too).
        ValueError: sizes or shapes that do not fit; a ``RuntimeError`` and an ``IndexError`` too, which PyTorch raises
            where the processors leave it to an operator.

    Source:
        ``image_processing_*.py`` of transformers 5.23. Where ours differs on purpose stands in ``docs/drop-ins.md``.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> outputs = SimpleNamespace(
        ...     logits=torch.tensor([[[3.0, -3.0]]]), pred_boxes=torch.tensor([[[0.5, 0.5, 1.0, 1.0]]])
        ... )
        >>> post_process_object_detection(outputs, target_sizes=[(10, 20)], family="rt_detr")[0]["boxes"]
        tensor([[ 0.,  0., 20., 10.]])
    """
    decode = _decode_of(outputs if family is None else family)
    given: dict[str, Any] = {"top_k": top_k} if top_k is not None else {}
    if not use_focal_loss:
        given |= {"use_focal_loss": use_focal_loss}
    for name in given:
        if name not in decode.takes:
            raise TypeError(f"{name} is not an argument of this family's processor: leave it out")
    return _post_process(decode, outputs, decode.threshold if threshold is None else threshold, target_sizes, **given)


@contextlib.contextmanager
def patched(processor: _Processor) -> Iterator[_Processor]:
    """Let an image processor decode with detpost inside a ``with`` block.

    Everything that goes through the processor follows: pipelines, and the ``post_process_grounded_object_detection`` of
    OWL-ViT's processors. The signature stays the processor's own. Blocks may be nested, and the processor is as before
    after each of them, also after an error.

    Args:
        processor: an image processor of :mod:`transformers`, or a processor that holds one as ``image_processor``.

    Yields:
        The same processor.

    Raises:
        TypeError: a processor whose decode is not covered.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> import transformers
        >>> processor = transformers.RTDetrImageProcessor()
        >>> outputs = SimpleNamespace(logits=torch.tensor([[[-3.0, 3.0]]]), pred_boxes=torch.rand(1, 1, 4))
        >>> with patched(processor):
        ...     processor.post_process_object_detection(outputs, threshold=0.3)[0]["labels"]
        tensor([1])
    """
    target: Any = getattr(processor, "image_processor", processor)
    decode = _decode_of(target)
    original = type(target)
    # A method set on the instance would hide the class's.
    hidden = {_METHOD: vars(target).pop(_METHOD)} if _METHOD in vars(target) else {}
    # The class changes and not the instance's attributes: those are what a processor saves as its configuration.
    target.__class__ = type(
        original.__name__,
        (original,),
        {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            _METHOD: _method(original, decode),
        },
    )
    try:
        yield processor
    finally:
        target.__class__ = original
        vars(target).update(hidden)


def _method(processor_class: Any, decode: _Decode) -> Callable[..., list[dict[str, Tensor]]]:
    """Make the method that stands in for the class's own, with its signature and defaults."""
    original = getattr(processor_class, _METHOD)
    signature = inspect.signature(original)
    defaults = {parameter.name: parameter.default for parameter in list(signature.parameters.values())[2:]}
    usual = defaults.keys() == {"threshold", "target_sizes", *decode.takes}

    @functools.wraps(original)
    def stand_in(*arguments: Any, **named: Any) -> list[dict[str, Tensor]]:
        # As most calls are: binding takes as long as decoding.
        if usual and len(arguments) == 2 and named.keys() <= defaults.keys():
            return _post_process(decode, arguments[1], **{**defaults, **named})
        given = signature.bind(*arguments, **named)
        given.apply_defaults()
        return _post_process(decode, *given.args[1:], **given.kwargs)

    return stand_in


def _post_process(
    decode: _Decode,
    outputs: Any,
    threshold: float,
    target_sizes: Tensor | Sequence[Any] | None,
    *extra: Any,
    **named: Any,
) -> list[dict[str, Tensor]]:
    options = {**dict(zip(decode.takes, extra, strict=False)), **named}
    if not (hasattr(outputs, "logits") and hasattr(outputs, "pred_boxes")):
        raise KindError(f"outputs must have logits and pred_boxes as attributes; got {type(outputs).__name__}")
    logits, boxes = outputs.logits, outputs.pred_boxes
    top_k = options.get("top_k")
    preset = decode.preset if options.get("use_focal_loss", True) else "detr"

    def otherwise(*_: Any) -> list[dict[str, Tensor]]:
        return _checked(decode, preset, logits, boxes, target_sizes, threshold, top_k)

    if not decode.square and type(threshold) in (float, int) and (top_k is None or (type(top_k) is int and top_k > 0)):
        direct, by_query = _direct(preset, decode.top_k if top_k is None else top_k)
        return direct.dicts(logits, boxes, target_sizes, otherwise, _NAMES, threshold=threshold, by_query=by_query)
    return otherwise()


def _checked(
    decode: _Decode, preset: str, logits: Any, boxes: Any, target_sizes: Any, threshold: Any, top_k: Any
) -> list[dict[str, Tensor]]:
    """Check what is not a plain call, and decode it."""
    check_outputs(logits, boxes)
    check_threshold(threshold, "threshold")
    queries = max(1, logits.shape[1])
    if isinstance(top_k, int) and not isinstance(top_k, bool) and top_k < 1:
        raise MisfitError(f"top_k must be at least 1; got {top_k}")
    spec = _spec(preset, top_k if top_k is not None else decode.top_k or queries)
    sizes = None if target_sizes is None else size_rows(target_sizes, logits, "target_sizes")
    if sizes is not None and decode.square:
        sizes = sizes.amax(dim=1, keepdim=True).expand(-1, 2)
    found = DetectionPostProcessor(spec)(logits, boxes, sizes)
    if spec.selection == "per_query":
        found = in_query_order(found, queries)
    images = split_by_image(found.valid & (found.scores > threshold), found.scores, found.labels, found.boxes)
    return [dict(zip(_NAMES, image, strict=True)) for image in images]


def _spec(preset: str, top_k: int) -> DecodeSpec:
    return DecodeSpec.preset(preset, top_k=top_k, clip=False)  # RF-DETR's own package clips; transformers' does not


@functools.lru_cache(maxsize=64)
def _direct(preset: str, top_k: int | None) -> tuple[kernels.DirectDecode, bool]:
    """Make the decode of plain calls, and say whether it gives the order of the queries; ``None`` keeps them all."""
    spec = _spec(preset, top_k or 1)
    return kernels.DirectDecode(spec, top_k=top_k or 0, takes_pairs=True), spec.selection == "per_query"


def _decode_of(family: Any) -> _Decode:
    """Tell the decode from an image processor, a config, a model, a model's outputs or a model_type."""
    for name in _names_of(family):
        if name in _DECODES:
            return _DECODES[name]
    what = repr(family) if isinstance(family, str) else type(family).__name__
    raise TypeError(f"no decode known for {what}: give family= an image processor, a config or one of {_known()}")


def _names_of(family: Any) -> Iterator[str]:
    config = getattr(family, "config", family)
    model_type = config if isinstance(config, str) else getattr(config, "model_type", None)
    if isinstance(model_type, str):
        yield _PROCESSOR_OF.get(model_type.replace("-", "_"), "")
    yield from _names_of_type(type(family))  # type: ignore[arg-type]


@functools.lru_cache(maxsize=64)
def _names_of_type(kind: type) -> tuple[str, ...]:
    found = []
    for base in kind.__mro__:
        processor = re.fullmatch(r"(\w+)ImageProcessor(Pil|Fast)?", base.__name__)
        found.append(processor[1] if processor else "")
        # The library's output classes live in its folder of the model.
        model = re.match(r"transformers\.models\.(\w+)\.modeling_\w+$", base.__module__)
        found.append(_PROCESSOR_OF.get(model[1], "") if model else "")
    return tuple(found)


def _known() -> str:
    return ", ".join(_PROCESSOR_OF)
