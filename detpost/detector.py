"""Images in, detections out, whatever the backend."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from detpost.detections import Detections
from detpost.heads.found import Found
from detpost.heads.segmenter import SegmenterModule
from detpost.images import FixedSize, Prepare, PreparedImage, Preprocessing, Untouched, opened
from detpost.integrations.model_names import look_up
from detpost.nms import NonMaximumSuppression
from detpost.postprocess import DetectionPostProcessor, DetectorModule
from detpost.spec import DecodeSpec

if TYPE_CHECKING:
    from detpost.export.opened import OpenedFile

__all__ = ["Detector", "detector_of_file"]

BACKENDS = ("eager", "compile", "onnx", "openvino", "cudagraph")

# images (B, 3, H, W), image sizes (B, 2), pixel mask (B, H, W) or None -> Detections
Run = Callable[[Tensor, Tensor, "Tensor | None"], Detections]
# The same, with what the detector gives beside boxes.
Find = Callable[[Tensor, Tensor, "Tensor | None"], Found]


class Detector:
    """A detector that takes images as they come and gives one dict per image.

    Make one with :meth:`load`.

    Args:
        run: the network and its post-processing.
        prepare: images to what ``run`` takes.
        class_names: the name of each label.
        device: where ``run`` wants its inputs.
        threshold: detections with ``score > threshold`` are given.
        batch: the batch size that ``run`` is fixed to; ``None`` where any will do.
        spec: how raw outputs are decoded, where that is known.
        preprocessing: the scaling and normalisation in ``prepare``, where that is known.
        prepare_as: where a file's preprocessing is an assumption, makes ``prepare`` of another one.
        find: of detectors that give more than boxes, the same as ``run`` with all of it.
        nms: as :meth:`load` takes it.

    Example:
        >>> detector = Detector.load("tiny", device="cpu")
        >>> detector.predict(torch.zeros(3, 64, 64))[0]["boxes"].shape
        torch.Size([0, 4])
    """

    def __init__(
        self,
        run: Run,
        prepare: Prepare,
        class_names: dict[int, str],
        device: torch.device,
        threshold: float = 0.5,
        batch: int | None = None,
        spec: DecodeSpec | None = None,
        preprocessing: Preprocessing | None = None,
        prepare_as: Callable[[Preprocessing], Prepare] | None = None,
        find: Find | None = None,
        nms: float | None = None,
    ) -> None:
        self.run = run
        self.find: Find = find or (lambda images, sizes, mask: Found(run(images, sizes, mask)))
        self.prepare = prepare
        self.class_names = class_names
        self.device = device
        self.threshold = threshold
        self.batch = batch
        self.spec = spec
        self.preprocessing = preprocessing
        self.prepare_as = prepare_as
        self.nms = nms

    @classmethod
    def load(
        cls,
        source: str | Path,
        backend: str = "eager",
        device: str | torch.device | None = None,
        threshold: float = 0.5,
        *,
        nms: float | None = None,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
    ) -> Detector:
        """Load a detector.

        Args:
            source: ``"tiny"`` (the digit detector that ships with detpost); a transformers directory or hub id; a
                detector of another library, ``"kornia:rtdetr_r18vd"``, ``"ultralytics:rtdetr-l"`` or ``"rfdetr:nano"``,
                with ``@FILE`` behind it for weights of one's own and ``@random`` for none; or a file that detpost
                wrote, of any format. Load only ``.pt2`` files that you trust: they hold machine code.
            backend: what runs a network: ``"eager"``; ``"compile"`` (``torch.compile``); ``"cudagraph"``; ``"onnx"``
                and ``"openvino"``, which export it to a temporary file and run that on the CPU, with one fixed input
                size. A file's format decides for itself.
            device: where to run; ``None`` takes CUDA where there is one, else the CPU; for a ``.pt2`` file, the device
                that it was made for.
            threshold: detections with ``score > threshold`` are given, within [0, 1].
            nms: drop a detection whose IoU with a better one of its class is greater, within [0, 1]: greedy
                non-maximum suppression, for detectors that report an object twice. It is no part of an exported file.
                ``None``: keep all.
            trust_remote_code: whether Python code that comes with a transformers detector's weights is run.
            allow_pickle: whether files of weights that are pickles may be opened: ``.pth`` and ``.pt`` files, and the
                weights that Ultralytics publishes.

        Returns:
            The detector.

        Raises:
            ImportError: a package that the source needs is missing; the message names the extra.
            OSError: nothing at that place; the message names detectors that are spelled alike.
            ValueError: an unknown backend or one that the device does not have, a threshold or ``nms`` out of range, a
                file that is not a whole detector written by detpost, or code or a pickle that is not trusted.

        Example:
            >>> detector = Detector.load("tiny", device="cpu", threshold=0.4)
            >>> detector.class_names[7], detector.spec.top_k
            ('7', 30)
        """
        if backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}: take one of {', '.join(BACKENDS)}")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must lie within [0, 1]; got {threshold}")
        if nms is not None and not 0 <= nms <= 1:
            raise ValueError(f"nms must be an IoU within [0, 1]; got {nms}")
        found = look_up(source)
        if found.kind == "file":
            return detector_of_file(_open_file(source, device), threshold, nms)
        if backend in ("onnx", "openvino"):
            return _through_file(source, backend, threshold, nms, trust_remote_code, allow_pickle)
        place = _place(device)
        if backend == "cudagraph" and place.type != "cuda":
            raise ValueError(f"backend 'cudagraph' needs a CUDA device; got {place}: take 'compile' there")
        from detpost.integrations.load import load_detector

        loaded = load_detector(source, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
        post = DetectionPostProcessor(loaded.spec)
        made = SegmenterModule(loaded.model, post) if loaded.gives_masks else DetectorModule(loaded.model, post)
        called = _in_backend(made.eval().to(place), backend, loaded.preprocessing is None)
        find = _find_of(called) if loaded.gives_masks else None
        return cls(
            called if find is None else lambda *inputs: find(*inputs).detections,
            loaded.prepare,
            loaded.class_names,
            place,
            threshold,
            spec=loaded.spec,
            preprocessing=loaded.export_preprocessing,
            find=find,
            nms=nms,
        )

    def predict(self, images: Any, batch_size: int = 8) -> list[dict[str, Any]]:
        """Detect in images of mixed sizes.

        Args:
            images: paths, PIL images, uint8 arrays (H, W, 3) in RGB order or tensors (3, H, W) that are uint8 or
                floating within [0, 1], mixed as you like; one alone is a list of one.
            batch_size: most images that go through the network at once.

        Returns:
            For each image ``scores`` (D,) float32, ``labels`` (D,) int64, ``label_names`` (a list of D) and ``boxes``
            (D, 4) float32, xyxy in pixels of the original image, best first, on the CPU. Of a detector that gives
            them, ``masks`` (D, height, width) bool in the image's own size, ``keypoints`` (D, N, 3) and
            ``oriented_boxes`` (D, 5).

        Raises:
            OSError: a file that is missing or cannot be read as an image.
            TypeError: an object that is not an image.
            ValueError: an array of another shape, or a batch size below 1.

        Example:
            >>> from detpost.zoo import sample_images
            >>> found = Detector.load("tiny").predict(sample_images()[0])
            >>> sorted(found[0])
            ['boxes', 'label_names', 'labels', 'scores']
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        sources = list(images) if _is_collection(images) else [images]
        size = self.batch or batch_size
        return [
            row
            for start in range(0, len(sources), size)
            for row in self.predict_ready([self.ready(source) for source in sources[start : start + size]])
        ]

    def ready(self, source: Any, max_pixels: int | None = None) -> PreparedImage:
        """Read an image and do what can be done to it alone; any thread may.

        Args:
            source: one image, as :meth:`predict` takes it.
            max_pixels: as :func:`detpost.images.read_image` takes it.

        Returns:
            What :meth:`predict_ready` takes.

        Raises:
            OSError, TypeError, ValueError: as of :meth:`predict`.
        """
        with opened(source, max_pixels) as image:
            return self.prepare.one(image)

    def predict_ready(self, images: Sequence[PreparedImage], encode_masks: bool = False) -> list[dict[str, Any]]:
        """Detect in images that are ready, in one batch where the detector takes any number.

        Args:
            images: of :meth:`ready`.
            encode_masks: give ``segmentations``, COCO's run lengths as JSON holds them, in place of ``masks``, which
                are large.

        Returns:
            As :meth:`predict`.
        """
        size = self.batch or max(1, len(images))
        return [
            row
            for start in range(0, len(images), size)
            for row in self._predict_batch(images[start : start + size], encode_masks)
        ]

    def _predict_batch(self, images: Sequence[PreparedImage], encode_masks: bool) -> list[dict[str, Any]]:
        # A run that is fixed to a batch size gets the last image again where images run out.
        filled = [*images, *[images[-1]] * ((self.batch or len(images)) - len(images))]
        batch, sizes, mask = self.prepare.batch(filled)
        with torch.no_grad():
            placed_mask = None if mask is None else mask.to(self.device)
            found = self.find(batch.to(self.device), sizes.to(self.device), placed_mask).first(len(images))
        kept = found.detections
        above = kept._replace(valid=kept.valid & (kept.scores > self.threshold))
        if self.nms is not None:
            above = NonMaximumSuppression(self.nms)(above)
        return [
            {
                "scores": image["scores"],
                "labels": image["labels"],
                "label_names": [self.class_names.get(label, str(label)) for label in image["labels"].tolist()],
                "boxes": image["boxes"],
                **found.beside_of(place, images[place].size, above.valid[place], encode_masks),
            }
            for place, image in enumerate(above.to_list())
        ]


def _place(device: str | torch.device | None) -> torch.device:
    """Find the device, and that it is there."""
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=place)
    # torch raises AssertionError where it was built without the device, RuntimeError where it has none or knows none.
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"no device {str(device)!r} here: {str(error).strip().splitlines()[0]}") from error
    return place


def _is_collection(images: Any) -> bool:
    """Tell many images from one: an array or tensor is one image unless it has a batch dimension."""
    if isinstance(images, (str, Path)):
        return False
    if hasattr(images, "ndim"):
        return bool(images.ndim == 4)
    return isinstance(images, Iterable)


def _find_of(called: Callable[..., Any]) -> Find:
    """Read what a :class:`SegmenterModule` gives in any backend."""

    def find(images: Tensor, image_sizes: Tensor, pixel_mask: Tensor | None) -> Found:
        detections, masks = called(images, image_sizes, pixel_mask)
        content = None
        if pixel_mask is not None:  # the image lies at the top left of a batch that is padded to the greatest
            filled = pixel_mask.to(torch.bool)
            content = torch.stack((filled.any(dim=2).float().mean(dim=1), filled.any(dim=1).float().mean(dim=1)), dim=1)
        return Found(detections, masks, content=content)

    return find


def _in_backend(module: nn.Module, backend: str, dynamic_size: bool) -> Callable[..., Any]:
    if backend == "compile":
        from detpost.export.compiled import compile

        return compile(module, dynamic_size=dynamic_size)
    if backend == "cudagraph":
        from detpost.export.cuda_graph import CudaGraph

        return CudaGraph(module)
    return module


def _through_file(
    source: str | Path, backend: str, threshold: float, nms: float | None, trust_remote_code: bool, allow_pickle: bool
) -> Detector:
    """Export to a temporary file and open that; both runtimes hold all of it in memory then."""
    from detpost.export.formats import FORMATS
    from detpost.integrations.load import load_detector

    loaded = load_detector(source, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    known: dict[str, Any] = {"preprocessing": loaded.export_preprocessing, "class_names": loaded.class_names}
    if loaded.gives_masks:
        known |= {"masks": "network"}
    taken = next(entry for entry in FORMATS if entry.name == backend)
    with tempfile.TemporaryDirectory(prefix="detpost-") as folder:
        path = Path(folder) / f"model{taken.ending}"
        try:  # many times quicker, for a file that nobody keeps
            written = taken.write()(loaded.model, path, loaded.spec, exporter="torchscript", **known)
        except ValueError:
            written = taken.write()(loaded.model, path, loaded.spec, **known)
        return detector_of_file(_open_file(written.path, None), threshold, nms)


def _open_file(path: str | Path, device: Any) -> OpenedFile:
    from detpost.export.opened import open_file

    return open_file(path, device)


def detector_of_file(opened: OpenedFile, threshold: float, nms: float | None = None) -> Detector:
    """Make a detector of a file: what it says of itself is all that is needed.

    Args:
        opened: of :func:`detpost.export.opened.open_file`.
        threshold: as for :meth:`Detector.load`.
        nms: likewise.

    Returns:
        The detector.

    Raises:
        ValueError: a file that is no whole detector, or does not say how images become its input.
    """
    from detpost.export.feed import Feed, recorded_preprocessing

    feed = Feed.of(opened.path, opened.metadata, opened.inputs)

    def find(images: Tensor, image_sizes: Tensor, pixel_mask: Tensor | None) -> Found:
        return opened.found(opened.run(feed(images, image_sizes)), image_sizes, images)

    def run(images: Tensor, image_sizes: Tensor, pixel_mask: Tensor | None) -> Detections:
        return find(images, image_sizes, pixel_mask).detections

    preprocessing = recorded_preprocessing(opened.metadata)
    if preprocessing is None:
        raise ValueError(
            f"{opened.path} does not say how images become its input: write it again with `detpost export` or `attach`"
        )
    inside = opened.metadata.get("preprocess_inside", False)

    def prepare_as(other: Preprocessing) -> Prepare:
        if inside == "full":
            return Untouched()
        same_size = replace(other, height=preprocessing.height, width=preprocessing.width)
        # A graph that scales and normalises leaves the resize alone to do here.
        fixed = Preprocessing(same_size.height, same_size.width, scale=1.0) if inside else same_size
        return FixedSize(fixed)

    return Detector(
        run,
        prepare_as(preprocessing),
        {int(label): name for label, name in opened.metadata["class_names"].items()},
        opened.device,
        threshold,
        1 if inside == "full" else feed.batch,  # images of a batch have one size there
        DecodeSpec(**opened.metadata["spec"]) if "spec" in opened.metadata else None,
        preprocessing,
        prepare_as if opened.metadata.get("preprocessing_assumed", False) else None,
        find,
        nms,
    )
