"""Detectors and post-processors to ONNX: one file, verified against PyTorch before it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from detpost.export.artifact import describe, finish
from detpost.export.attachment import attach_graph
from detpost.export.choices import check_choices
from detpost.export.decode_graph import OLDEST_OPSET, Ties, decode_graph
from detpost.export.front_graph import (
    RESIZE_OPSET,
    Resize,
    done_by_runner,
    put_affine_in_front,
    put_resize_in_front,
    without_sizes,
)
from detpost.export.graph import import_onnx
from detpost.export.heads import (
    Head,
    KeypointHead,
    MaskHead,
    MaskSize,
    OrientedHead,
    bare_heads,
    free_sides,
    heads_of,
    raw_name,
    value_of_head,
)
from detpost.export.layouts import Layout, layout_of
from detpost.export.runtime import onnx_session
from detpost.export.slots import HEADS_OPSET
from detpost.export.source import ExportSource, evaluating, first_line
from detpost.export.torch_exporters import export_dynamo, export_torchscript
from detpost.export.written import WrittenFile
from detpost.images import Preprocessing
from detpost.postprocess import DetectionPostProcessor, raw_outputs
from detpost.spec import DecodeSpec

if TYPE_CHECKING:
    import onnx

__all__ = ["to_onnx"]

Exporter = Literal["auto", "torchscript", "dynamo"]
Progress = Callable[[str], None]
Dynamic = dict[str, dict[int, str]]

# Of a bare decode and of what the older exporter makes: what ONNX Runtime, OpenVINO and TensorRT have taken for years.
DEFAULT_OPSET = 17
_OLDEST_DYNAMO_OPSET = 18  # the newer exporter writes no older one


def to_onnx(
    model: str | Path | nn.Module,
    path: str | Path,
    spec: DecodeSpec | None = None,
    *,
    num_queries: int | None = None,
    num_classes: int | None = None,
    image_size: tuple[int, int] | None = None,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    io: str | Layout = "detpost",
    ties: Ties = "exact",
    queries: bool = False,
    keep_raw: bool = False,
    masks: MaskSize | MaskHead | None = None,
    keypoints: KeypointHead | None = None,
    oriented: OrientedHead | None = None,
    heads: Sequence[Head] = (),
    preprocessing: Preprocessing | None = None,
    preprocess_inside: bool | Literal["scale", "full"] = False,
    resize: Resize | None = None,
    class_names: Mapping[int, str] | None = None,
    opset: int | None = None,
    exporter: Exporter = "auto",
    progress: Progress | None = None,
) -> WrittenFile:
    """Export a detector with its post-processing, or a post-processor alone, to one ONNX file.

    The graph has inputs ``images`` (B, 3, H, W) float32 and ``image_sizes`` (B, 2) int64, (height, width) in pixels,
    and outputs ``labels`` (B, K) int64, ``boxes`` (B, K, 4) float32 xyxy in pixels, ``scores`` (B, K) float32 and
    ``valid`` (B, K) bool. A post-processor alone takes ``pred_logits`` (B, Q, C) and ``pred_boxes`` (B, Q, 4) in place
    of ``images``. Before the file is written the graph passes ``onnx.checker`` with full shape inference and, where
    onnxruntime is installed, is run against PyTorch at two batch sizes (and two image sizes where those are dynamic).

    Args:
        model: ``"tiny"``, a transformers directory or hub id, any module that :func:`detpost.postprocess.raw_outputs`
            can read, or a :class:`DetectionPostProcessor`.
        path: where to write. The file appears whole or not at all.
        spec: how the outputs are decoded; ``None`` takes the family's preset (a plain module needs one).
        num_queries: Q, for a post-processor alone.
        num_classes: C, for a post-processor alone.
        image_size: (height, width) of the network input; ``None`` takes the model's own.
        dynamic_batch: whether the batch size is free.
        dynamic_size: whether the image size is free.
        io: what the file's runner takes and gives, an entry of ``detpost.export.LAYOUTS`` or a :class:`Layout` of one's
            own: ``"detpost"`` as above; ``"rtdetr"`` as RT-DETR and D-FINE runners expect (``images``,
            ``orig_target_sizes`` as (width, height); ``labels``, ``boxes``, ``scores``); ``"efficientnms"`` gives
            ``num_dets`` (B, 1) int32, ``det_boxes``, ``det_scores`` and ``det_classes`` (B, K) int32; ``"deepstream"``
            and ``"ultralytics"`` take images alone and give one output (B, K, 6) float32, boxes in pixels of the
            network's input, score, label; ``"frigate"``; ``"roboflow"``.
        ties: ``"exact"`` resolves equal scores in the graph, so that every runtime chooses the same;
            ``"onnx"`` leaves them to ONNX's promise that TopK takes the lower index first, in a third of the nodes.
        queries: whether ``queries`` (B, K) int64 is an output too.
        keep_raw: whether ``pred_logits`` and ``pred_boxes`` are outputs too, and the raw values of heads.
        masks: ``"network"`` or ``"image"``: ``masks`` of that size is an output too, see :class:`MaskHead`. The network
            must return a mapping with ``pred_masks`` (B, Q, h, w); a post-processor alone has it as an input.
        keypoints: likewise with ``pred_keypoints``, see :class:`KeypointHead`; of a whole detector alone.
        oriented: likewise with ``pred_oriented_boxes`` (B, Q, 5), see :class:`OrientedHead`.
        heads: any of these and others of :mod:`detpost.export.heads`, after them.
        preprocessing: for a plain module, how images become its input; recorded in the file.
        preprocess_inside: ``"scale"`` or ``True`` takes ``images`` as uint8 0..255, resized but neither scaled nor
            normalised; ``"full"`` takes them as they are, uint8 (B, 3, H, W) of any size, all of a batch of the same:
            one input, and boxes in pixels of these images. It needs operator set 18, and takes it.
        resize: how ``"full"`` resizes; ``None`` stretches with antialiasing, as the families' own pipelines do.
        class_names: the name of each label, recorded in the file; ``None`` takes the model's own.
        opset: version of the default operator set, 11 or later; ``None`` is 18 from the newer exporter, else 17.
        exporter: PyTorch's exporter for the network: ``"dynamo"``, the newer one, or ``"torchscript"``. ``"auto"``
            takes the first of them whose graph agrees with PyTorch, the older first where ``opset`` is below 18, and
            notes why it did not take the other.
        progress: called with one line before each long step.

    Returns:
        What was written.

    Raises:
        ImportError: onnx is missing; the message names the extra.
        ValueError: arguments that do not fit, or a graph that no exporter could make; the message says why.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> post = DetectionPostProcessor.from_preset("rtdetr", top_k=10)
        >>> with TemporaryDirectory() as folder:
        ...     to_onnx(post, f"{folder}/post.onnx", num_queries=20, num_classes=5).outputs
        ('labels', 'boxes', 'scores', 'valid')
    """
    full = preprocess_inside == "full"
    layout = without_sizes(layout_of(io)) if full else layout_of(io)
    _check_choices(ties, exporter, opset, preprocess_inside)
    if full and (dynamic_size or isinstance(model, DetectionPostProcessor)):
        raise ValueError("preprocess_inside='full' is for a whole detector with an input of one size")
    asked = heads_of(masks, keypoints, oriented, heads)
    if asked and opset is not None and opset < HEADS_OPSET:
        raise ValueError(f"heads beside boxes need opset {HEADS_OPSET} or later; got {opset}")
    say = progress or (lambda _: None)
    if isinstance(model, DetectionPostProcessor):
        if num_queries is None or num_classes is None:
            raise ValueError("a post-processor alone needs num_queries and num_classes")
        if num_queries < 1 or num_classes < 1:
            raise ValueError(f"num_queries and num_classes must be at least 1; got {num_queries} and {num_classes}")
        say("exporting the post-processing")
        graph = decode_graph(
            spec or model.spec,
            num_queries,
            num_classes,
            opset=opset or DEFAULT_OPSET,
            io=layout,
            ties=ties,
            queries=queries,
            input_size=image_size,
            dynamic_batch=dynamic_batch,
            heads=bare_heads(asked, num_queries),
        )
        shape = {"num_classes": num_classes, "input_size": None if image_size is None else list(image_size)}
        metadata = {**describe(spec or model.spec, class_names, layout, ties, False, asked), **shape}
        return finish(graph, Path(path), metadata, layout=layout, exporter="none")
    source = ExportSource.of(model, spec, image_size, preprocessing, class_names)
    with evaluating(source.model):
        version = max(opset or RESIZE_OPSET, RESIZE_OPSET) if full else opset
        scaled = bool(preprocess_inside) and not full
        raw = _export_network(source, version, exporter, dynamic_batch, dynamic_size, scaled, asked, say)
    say("attaching the post-processing")
    attached = attach_graph(
        raw.model,
        source.spec,
        logits="pred_logits",
        boxes="pred_boxes",
        io=layout,
        ties=ties,
        queries=queries,
        keep_raw=keep_raw,
        heads=tuple(replace(head, source=raw_name(head)) for head in asked),
        resized_inside=full,
    )
    preprocessing, resize = source.preprocessing, resize or Resize()
    if full:
        put_resize_in_front(attached.model, "images", preprocessing, resize)
    elif not preprocess_inside and done_by_runner(layout, preprocessing) != preprocessing:
        preprocessing = done_by_runner(layout, preprocessing)
        put_affine_in_front(attached.model, "images", source.preprocessing, preprocessing)
    metadata = {
        **describe(source.spec, source.class_names, layout, ties, keep_raw, asked),
        "exporter": raw.exporter,
        "num_classes": attached.num_classes,
        "raw_values": attached.raw_values,
        "input_size": None if dynamic_size else list(source.image_size),
        "feed": {"images": "images", "image_sizes": layout.sizes, "ones": []},
        "preprocessing": preprocessing.to_dict(),
        "preprocess_inside": "full" if full else bool(preprocess_inside),
        **({"resize": vars(resize)} if full else {}),
    }
    say("checking and writing the file")
    return finish(attached.model, Path(path), metadata, layout=layout, exporter=raw.exporter, notes=raw.notes)


def _check_choices(ties: str, exporter: str, opset: int | None, preprocess_inside: bool | str) -> None:
    check_choices(
        {
            "preprocess_inside": (preprocess_inside, (False, True, "scale", "full")),
            "ties": (ties, get_args(Ties)),
            "exporter": (exporter, get_args(Exporter)),
        }
    )
    if opset is not None and opset < OLDEST_OPSET:
        raise ValueError(f"opset must be {OLDEST_OPSET} or later; got {opset}")


class _RawNetwork(nn.Module):
    """Images to (logits, boxes, values of heads), with the scaling and normalisation in front on request."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing | None, heads: tuple[Head, ...] = ()) -> None:
        super().__init__()
        self.model = model
        self.preprocessing = preprocessing
        self.heads = heads

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.preprocessing is not None:
            images = self.preprocessing.normalise(images.to(torch.float32))
        with _PlainAttention():
            found = self.model(images)
            return *raw_outputs(found), *(value_of_head(found, head) for head in self.heads)


@dataclass(frozen=True)
class _RawGraph:
    model: onnx.ModelProto
    exporter: str
    notes: tuple[str, ...]


def _export_network(
    source: ExportSource,
    opset: int | None,
    exporter: Exporter,
    dynamic_batch: bool,
    dynamic_size: bool,
    preprocess_inside: bool,
    heads: tuple[Head, ...],
    say: Progress,
) -> _RawGraph:
    """Export the network with the first exporter whose graph agrees with PyTorch."""
    onnx = import_onnx()
    network = _RawNetwork(source.model, source.preprocessing if preprocess_inside else None, heads).eval()
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    dtype = torch.uint8 if preprocess_inside else torch.float32
    example = _images(2 if dynamic_batch else 1, source.image_size, dtype, seed=0).to(device)
    free = {0: "batch"} if dynamic_batch else {}
    dynamic = {"images": {**free, **({2: "height", 3: "width"} if dynamic_size else {})}}
    outputs = ("pred_logits", "pred_boxes", *map(raw_name, heads))
    dynamic |= {name: dict(free) for name in outputs}
    if dynamic_size:
        dynamic |= {raw_name(head): {**free, **free_sides(head)} for head in heads}
    failures: list[str] = []
    for name in _in_order(exporter, opset):
        say(f"exporting the network ({name} exporter)")
        try:
            model = _EXPORTERS[name](network, example, outputs, dynamic, opset or DEFAULT_OPSET)
            onnx.checker.check_model(model, full_check=True)
            say("comparing the network with PyTorch")
            _compare_with_eager(network, model, source.image_size, dtype, device, dynamic_batch, dynamic_size)
        except Exception as error:  # an exporter may fail with anything, and the user should meet no stack trace
            failures.append(f"the {name} exporter failed: {first_line(error)}")
            continue
        return _RawGraph(model, name, (*failures, f"network exported with the {name} exporter"))
    raise ValueError("no exporter could make the graph: " + "; ".join(failures))


def _torchscript(
    network: nn.Module, example: Tensor, outputs: tuple[str, ...], dynamic: Dynamic, opset: int
) -> onnx.ModelProto:
    dynamic = {name: axes for name, axes in dynamic.items() if axes}
    return export_torchscript(network, (example,), ("images",), outputs, dynamic, opset)


def _dynamo(
    network: nn.Module, example: Tensor, outputs: tuple[str, ...], dynamic: Dynamic, opset: int
) -> onnx.ModelProto:
    return export_dynamo(network, example, "images", outputs, dynamic["images"], opset)


_EXPORTERS: dict[str, Callable[[nn.Module, Tensor, tuple[str, ...], Dynamic, int], Any]] = {
    "dynamo": _dynamo,
    "torchscript": _torchscript,
}


# The newer one first, which takes every family of the presets; the older one is ten times quicker.
_ORDER: tuple[str, ...] = ("dynamo", "torchscript")


def _in_order(exporter: Exporter, opset: int | None) -> tuple[str, ...]:
    """Give the exporters to try: the older one first where the newer writes no operator set as old as is asked."""
    if exporter != "auto":
        return (exporter,)
    return ("torchscript", "dynamo") if opset is not None and opset < _OLDEST_DYNAMO_OPSET else _ORDER


def _images(batch: int, size: tuple[int, int], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(batch, 3, *size, generator=generator)
    return (pixels * 255).to(torch.uint8) if dtype == torch.uint8 else pixels


def _compare_with_eager(
    network: nn.Module,
    model: onnx.ModelProto,
    image_size: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    dynamic_batch: bool,
    dynamic_size: bool,
) -> None:
    """Run the graph where it was not traced: a tracer that took a size for a constant shows there.

    A detector may pick its own queries with a top-k, so rows may change places: the sorted best logits are compared.
    For the same reason PyTorch's own top-k breaks ties by index here, as ONNX Runtime's does: in a network that is not
    trained yet all candidates may tie.
    """
    try:
        session = onnx_session(model.SerializeToString())
    except ImportError:
        return
    sizes = [image_size, *([(image_size[0] + 64, image_size[1] + 32)] if dynamic_size else [])]
    for seed, (batch, size) in enumerate((b, s) for b in ((1, 3) if dynamic_batch else (1,)) for s in sizes):
        images = _images(batch, size, dtype, seed=seed + 1)
        with torch.no_grad(), _StableTopK():
            expected = network(images.to(device))[0].cpu()
        got = torch.from_numpy(session.run(["pred_logits"], {"images": images.numpy()})[0])
        if got.shape != expected.shape:
            raise ValueError(f"the graph gives logits {tuple(got.shape)} where PyTorch gives {tuple(expected.shape)}")
        best = [values.float().amax(dim=2).sort(dim=1).values for values in (got, expected)]
        # Not the greatest: one query more or less at the detector's own cut is no fault of the graph.
        difference = float((best[0] - best[1]).abs().quantile(0.9)) if best[0].numel() else 0.0
        if not difference <= _MOST_LOGIT_DIFFERENCE:
            raise ValueError(
                f"the graph's logits differ from PyTorch's by {difference:.3g} at batch {batch}, size {size}"
            )


class _PlainAttention(TorchFunctionMode):
    """Leave ``enable_gqa`` out where every head has keys of its own.

    It changes nothing there, and both exporters of PyTorch refuse it; transformers sets it for LW-DETR and RF-DETR.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention and kwargs.get("enable_gqa"):
            query, key = args[:2]
            kwargs = {**kwargs, "enable_gqa": bool(query.shape[-3] != key.shape[-3])}  # a tensor while it is traced
        return func(*args, **kwargs)


class _StableTopK(TorchFunctionMode):
    """Make ``torch.topk`` take the lower index first among equal values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.topk, Tensor.topk):
            return func(*args, **(kwargs or {}))
        return _stable_top_k(*args, **(kwargs or {}))


def _stable_top_k(
    values: Tensor, k: int, dim: int = -1, axis: int | None = None, largest: bool = True, sorted: bool = True
) -> torch.return_types.topk:
    found = values.sort(dim=dim if axis is None else axis, descending=largest, stable=True)
    kept = [part.narrow(dim if axis is None else axis, 0, k) for part in found]
    return torch.return_types.topk((kept[0], kept[1]))


# Whole networks in another runtime differ by rounding alone; a wrong graph differs by more than this.
_MOST_LOGIT_DIFFERENCE = 0.05
