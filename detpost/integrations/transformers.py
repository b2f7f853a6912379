"""Detectors from the transformers library: loading them, and decoding in place of their image processors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detpost.images import MOST_PIXELS, FixedSize, Prepare, PreparedImage, Preprocessing, Rows, shrunk, sizes_of
from detpost.integrations.image_processors import patched, post_process_object_detection
from detpost.integrations.loaded import LoadedDetector
from detpost.integrations.model_names import ModelName, look_up, spelled_alike
from detpost.spec import DecodeSpec, has_preset

__all__ = ["LoadedDetector", "load_detector", "patched", "post_process_object_detection"]


def load_detector(source: str | Path, *, trust_remote_code: bool = False) -> LoadedDetector:
    """Load a detector from a transformers directory or hub id, in float32 and evaluation mode.

    Args:
        source: ``"tiny"``, a directory with ``config.json`` and ``model.safetensors``, or a hub id.
            ``preprocessor_config.json`` may be missing: the family's defaults serve then, at the input size that the
            model's config names.
        trust_remote_code: whether Python code that comes with the weights (``auto_map`` in ``config.json``) is run.

    Returns:
        The detector.

    Raises:
        ImportError: transformers is not installed.
        ValueError: not a detector, a family without a preset, or code that is not trusted.
        OSError: nothing at that place, or files that cannot be read.
    """
    found = look_up(source)
    try:
        import transformers
    except ImportError:
        raise ImportError("transformers detectors need transformers: pip install 'detpost[hf]'") from None
    place = found.path or found.name
    # Never None, with which transformers asks on the terminal.
    trust = {"trust_remote_code": trust_remote_code}
    with _quiet():
        with _in_one_line(found):
            config = transformers.AutoConfig.from_pretrained(place, **trust)
        family = _family_of(config)
        known = config if family == config.model_type else {**config.to_dict(), "model_type": family}
        spec = DecodeSpec.from_config(known)
        with _in_one_line(found):
            # Safetensors alone: nothing is unpickled.
            segmenter = _segmenter_of(transformers, config)
            model, loading = (segmenter or transformers.AutoModelForObjectDetection).from_pretrained(
                place, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **trust
            )
            missing = sorted(loading["missing_keys"])
            if missing:  # transformers draws them at random and says so in a log
                raise OSError(f"its weights lack {len(missing)} of the network's parameters, the first is {missing[0]}")
            processor = _processor(place, config, family, trust)
    preprocessing = _fixed_size(processor)
    edge = int((processor.size or {}).get("shortest_edge") or 640)
    return LoadedDetector(
        model=model.eval(),
        spec=spec,
        class_names={int(label): str(name) for label, name in config.id2label.items()},
        preprocessing=preprocessing,
        export_preprocessing=preprocessing or _at_size(processor, edge, edge),
        prepare=_Processor(processor) if preprocessing is None else FixedSize(preprocessing),
        gives_masks=segmenter is not None,
    )


def _segmenter_of(transformers: Any, config: Any) -> Any:
    """Give the class of a detector that gives masks too, by the name that its config has for it; else ``None``."""
    names = getattr(config, "architectures", None) or []
    found = [name for name in names if name.endswith(("ForSegmentation", "ForInstanceSegmentation"))]
    return getattr(transformers, found[0], None) if found else None


@contextlib.contextmanager
def _in_one_line(source: ModelName) -> Iterator[None]:
    """Turn transformers' paragraphs into one line each, whose first sentence says what is wrong."""
    try:
        yield
    except ImportError:
        raise
    # Damaged weights raise safetensors' own type, a config of the wrong form TypeError, KeyError and more.
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{source.name!r} brings Python code of its own, which is not run: read it, and if you trust it take "
                "--trust-remote-code (trust_remote_code=True)"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if source.kind == "hub":
            reason = f"neither a file, a transformers directory nor a hub id: {reason}{spelled_alike(source.name)}"
        raise OSError(f"no detector at {source.name!r}: {reason}") from error


def _family_of(config: Any) -> str:
    """Give the config's model_type, or that of the transformers class it derives from where it has none of ours."""
    names = [str(config.model_type), *(str(getattr(parent, "model_type", "")) for parent in type(config).__mro__)]
    return next((name for name in names if has_preset(name)), names[0])


def _processor(place: str | Path, config: Any, family: str, trust: dict[str, bool]) -> Any:
    import transformers
    from transformers.utils import cached_file

    # Asked for by name: a processor that is there and cannot be read must not be taken for one that is not.
    names = ("preprocessor_config.json", "processor_config.json")
    if any(cached_file(place, name, _raise_exceptions_for_missing_entries=False) for name in names):
        return transformers.AutoImageProcessor.from_pretrained(place, **trust)
    # RT-DETR's relatives take plain 0..1 images of the size their anchors are made for; the others take the defaults
    # of the original DETR, which all their processors share.
    if family not in ("rt_detr", "rt_detr_v2", "d_fine", "deimv2"):
        return transformers.DetrImageProcessor()
    named = (getattr(config, name, None) for name in ("anchor_image_size", "eval_size"))
    size = next((value for value in named if value), 640)
    height, width = (size, size) if isinstance(size, int) else size
    return transformers.RTDetrImageProcessor(size={"height": height, "width": width})


def _fixed_size(processor: Any) -> Preprocessing | None:
    """Read a processor that resizes every image to one size; ``None`` for one that does anything else."""
    size = processor.size or {}
    bilinear = int(getattr(processor, "resample", 2)) == 2
    if "height" not in size or "width" not in size or not processor.do_resize or not bilinear:
        return None
    return _at_size(processor, int(size["height"]), int(size["width"]))


def _at_size(processor: Any, height: int, width: int) -> Preprocessing:
    normalise = processor.do_normalize
    return Preprocessing(
        height=height,
        width=width,
        scale=float(processor.rescale_factor) if processor.do_rescale else 1.0,
        mean=tuple(map(float, processor.image_mean)) if normalise else (0.0, 0.0, 0.0),  # type: ignore[arg-type]
        std=tuple(map(float, processor.image_std)) if normalise else (1.0, 1.0, 1.0),  # type: ignore[arg-type]
    )


class _Processor(Prepare):
    """A transformers image processor whose output size follows the image: each alone, padded to the greatest then."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def one(self, image: Rows) -> PreparedImage:
        # It takes an image whole: one that is too large for that is shrunk first, by a whole number.
        times = math.ceil(math.sqrt(image.height * image.width / MOST_PIXELS))
        whole = image.rows(0, image.height) if times <= 1 else shrunk(image, times)
        found = self._processor(images=[whole], return_tensors="pt", input_data_format="channels_first")
        mask = found.get("pixel_mask")
        return PreparedImage(found["pixel_values"][0], (image.height, image.width), None if mask is None else mask[0])

    def batch(self, images: Sequence[PreparedImage]) -> tuple[Tensor, Tensor, Tensor | None]:
        height, width = (max(image.pixels.shape[side] for image in images) for side in (1, 2))
        masks = [image.mask for image in images if image.mask is not None]
        if not masks and any(image.pixels.shape[1:] != (height, width) for image in images):
            raise ValueError("the processor does not pad, and these images become different sizes: run them one by one")
        # Planes, whatever the images came as: a network computes other last places on channels that lie last.
        pixels = torch.stack([_padded(image.pixels, height, width) for image in images]).contiguous()
        mask = torch.stack([_padded(each, height, width) for each in masks]) if masks else None
        return pixels, sizes_of(images), mask


def _padded(values: Tensor, height: int, width: int) -> Tensor:
    """Fill up with zeros at the bottom and on the right."""
    return torch.nn.functional.pad(values, (0, width - values.shape[-1], 0, height - values.shape[-2]))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off the terminal, and put its settings back."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
