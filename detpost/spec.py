"""What a decode does, as one frozen value, and the presets for the detector families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import isfinite
from typing import Any, Final, Literal, get_args

__all__ = ["BOX_FORMAT_CODES", "DecodeSpec", "presets"]

Activation = Literal["sigmoid", "softmax"]
Selection = Literal["flat", "per_query"]
Background = Literal["none", "first", "last"]
BoxFormat = Literal["cxcywh", "xyxy", "xywh"]

# The formats as numbers, for kernels that are told by one: native.cpp's too.
BOX_FORMAT_CODES: Final[dict[str, int]] = {"cxcywh": 0, "xyxy": 1, "xywh": 2}

_CHOICES: dict[str, tuple[str, ...]] = {
    "activation": get_args(Activation),
    "selection": get_args(Selection),
    "background": get_args(Background),
    "box_format": get_args(BoxFormat),
}


@dataclass(frozen=True)
class DecodeSpec:
    """How raw logits and boxes become detections.

    Args:
        activation: ``"sigmoid"`` scores each class alone (focal-loss detectors); ``"softmax"`` scores the classes of a
            query against each other.
        selection: ``"flat"`` ranks all (query, class) pairs, so that one query may be kept for several classes;
            ``"per_query"`` keeps the best class of each query.
        top_k: most detections kept per image, at least 1.
        score_threshold: keep ``score > score_threshold``, within [0, 1]; ``None`` keeps all. Never changes a shape.
        background: the class channel that means "no object": ``"none"``, ``"first"`` or ``"last"``. It takes part in
            the softmax and is never reported. Labels stay class channels of the logits: with ``"first"`` the first
            object has label 1.
        box_format: format of the boxes that come in, in units of the image.
        clip: whether boxes are clipped to the image.

    Raises:
        ValueError: a value outside the sets and ranges above.
        TypeError: a value of another type, or a field that does not exist.

    Example:
        >>> DecodeSpec(top_k=100, score_threshold=0.5).selection
        'flat'
    """

    activation: Activation = "sigmoid"
    selection: Selection = "flat"
    top_k: int = 300
    score_threshold: float | None = None
    background: Background = "none"
    box_format: BoxFormat = "cxcywh"
    clip: bool = False

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool):
            raise TypeError(f"top_k must be an int; got {self.top_k!r}")
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1; got {self.top_k}")
        threshold = self.score_threshold
        if threshold is not None:
            if not isinstance(threshold, (int, float)) or isinstance(threshold, bool):
                raise TypeError(f"score_threshold must be a float or None; got {threshold!r}")
            if not isfinite(threshold) or not 0 <= threshold <= 1:
                raise ValueError(f"score_threshold must lie within [0, 1]; got {threshold}")
        if not isinstance(self.clip, bool):
            raise TypeError(f"clip must be True or False; got {self.clip!r}")

    def background_channel(self, classes: int) -> int:
        """Give the channel that means "no object".

        Args:
            classes: number of class channels of the logits.

        Returns:
            Its index, or -1 where there is none.

        Example:
            >>> DecodeSpec.preset("detr").background_channel(92)
            91
        """
        return {"none": -1, "first": 0, "last": classes - 1}[self.background]

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> DecodeSpec:
        """Give the spec of a detector family, with single fields changed on request.

        Args:
            name: one of :func:`presets`.
            overrides: fields of :class:`DecodeSpec` to change.

        Returns:
            The spec.

        Raises:
            ValueError: an unknown preset, or a value out of range.
            TypeError: an unknown field.

        Example:
            >>> DecodeSpec.preset("detr").background
            'last'
            >>> DecodeSpec.preset("rtdetr", score_threshold=0.3).score_threshold
            0.3
        """
        if name not in _PRESETS:
            raise ValueError(f"unknown preset {name!r}: take one of {', '.join(_PRESETS)}")
        known = [field.name for field in fields(cls)]
        unknown = [key for key in overrides if key not in known]
        if unknown:
            raise TypeError(f"unknown field {unknown[0]!r}: DecodeSpec has {', '.join(known)}")
        return cls(**{**_PRESETS[name].decode, **overrides})

    @classmethod
    def from_config(cls, config: Any, **overrides: Any) -> DecodeSpec:
        """Pick the spec for a transformers config, so that the result is the library's own decode.

        Args:
            config: a transformers config, or any object or mapping with ``model_type``.
            overrides: fields of :class:`DecodeSpec` to change.

        Returns:
            The family's preset. ``top_k`` follows the number of queries where the family keeps that many. Two presets
            go by the detector's own repository and not by the processor that transformers gives it: RF-DETR's boxes
            are clipped to the image, and LW-DETR keeps as many detections as it has queries, not 100.

        Raises:
            ValueError: a family that no preset covers.

        Example:
            >>> DecodeSpec.from_config({"model_type": "rt_detr_v2", "num_queries": 50}).top_k
            50
        """
        family, families = _read(config, "model_type"), _families()
        if family not in families:
            raise ValueError(f"no preset for model_type {family!r}: known are {', '.join(families)}")
        name = families[family]
        queries = None if _PRESETS[name].fixed_top_k else _query_count(config)
        return cls.preset(name, **{**({"top_k": queries} if queries else {}), **overrides})


def presets() -> tuple[str, ...]:
    """Give the names of the presets.

    Returns:
        The names that :meth:`DecodeSpec.preset` knows.

    Example:
        >>> "rtdetr" in presets()
        True
    """
    return tuple(_PRESETS)


def has_preset(model_type: str) -> bool:
    """Tell whether a preset covers a transformers ``model_type``."""
    return model_type in _families()


def presets_like(spec: DecodeSpec) -> tuple[str, ...]:
    """Give the presets that differ from ``spec`` in ``top_k`` and threshold at the most: several decode alike."""
    neutral = {"top_k": 300, "score_threshold": None}
    plain = replace(spec, **neutral)  # type: ignore[arg-type]
    return tuple(name for name, row in _PRESETS.items() if DecodeSpec(**{**row.decode, **neutral}) == plain)


def normalisation_of(preset: str) -> tuple[Channels, Channels]:
    """Give mean and deviation of each channel that a preset's detectors were trained on, of pixels of 0..1."""
    return _PRESETS[preset].normalisation


def _families() -> dict[str, str]:
    """Give the preset of each ``model_type`` of transformers."""
    return {model_type: name for name, row in _PRESETS.items() for model_type in row.model_types}


def _read(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _query_count(config: Any) -> int | None:
    """Read the number of queries out of a config; OWL-ViT's queries are its patches."""
    vision = _read(config, "vision_config")
    side, patch = (_read(vision, name) for name in ("image_size", "patch_size"))
    patches = (side // patch) ** 2 if side and patch else None
    return _read(config, "num_queries") or _read(config, "num_detection_tokens") or patches


Channels = tuple[float, float, float]

_PLAIN: tuple[Channels, Channels] = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
_IMAGENET: tuple[Channels, Channels] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP: tuple[Channels, Channels] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class _Preset:
    """What is known of a family of detectors.

    Args:
        decode: the fields of :class:`DecodeSpec` that differ from the defaults.
        normalisation: mean and deviation of each channel that its detectors were trained on after scaling to 0..1, by
            their own repositories.
        model_types: transformers' names of it.
        fixed_top_k: whether as many detections are kept however many queries there are.
    """

    decode: Mapping[str, Any]
    normalisation: tuple[Channels, Channels]
    model_types: tuple[str, ...] = ()
    fixed_top_k: bool = False


_SOFTMAX: dict[str, Any] = {"activation": "softmax", "background": "last", "selection": "per_query"}

_PRESETS: dict[str, _Preset] = {
    # Also RT-DETRv3, DEIM. Of PP-DocLayout the boxes; the reading order is the library's.
    "rtdetr": _Preset({}, _PLAIN, ("rt_detr", "rt_detr_v2", "d_fine", "deimv2", "pp_doclayout_v2", "pp_doclayout_v3")),
    "rfdetr": _Preset({"clip": True}, _IMAGENET, ("rf_detr",)),
    "lwdetr": _Preset({}, _IMAGENET, ("lw_detr",)),
    "deformable_detr": _Preset({"top_k": 100}, _IMAGENET, ("deformable_detr",), fixed_top_k=True),
    "conditional_detr": _Preset({"top_k": 100}, _IMAGENET, ("conditional_detr",), fixed_top_k=True),
    "dab_detr": _Preset({"top_k": 100}, _IMAGENET, ("dab-detr",), fixed_top_k=True),
    "detr": _Preset(_SOFTMAX, _IMAGENET, ("detr",)),
    "yolos": _Preset(_SOFTMAX, _IMAGENET, ("yolos",)),
    "table_transformer": _Preset(_SOFTMAX, _IMAGENET, ("table-transformer",)),
    # Text-conditioned: a class is a phrase or a token of the prompt, and each query is kept for its best one. They keep
    # all their queries; these are the most that a published checkpoint has.
    "owlvit": _Preset({"selection": "per_query", "top_k": 3600}, _CLIP, ("owlvit",)),
    "owlv2": _Preset({"selection": "per_query", "top_k": 5184}, _CLIP, ("owlv2",)),
    "grounding_dino": _Preset(
        {"selection": "per_query", "top_k": 900}, _IMAGENET, ("grounding-dino", "mm-grounding-dino")
    ),
}
