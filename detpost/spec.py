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
        return cls(**{**_PRESETS[name], **overrides})

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
        family = _read(config, "model_type")
        if family not in _FAMILIES:
            raise ValueError(f"no preset for model_type {family!r}: known are {', '.join(_FAMILIES)}")
        name = _FAMILIES[family]
        queries = None if name in _FIXED_TOP_K else _query_count(config)
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
    return model_type in _FAMILIES


def name_of_preset(spec: DecodeSpec) -> str | None:
    """Give the first preset that differs from ``spec`` in ``top_k`` and threshold at the most, or ``None``."""
    neutral = {"top_k": 300, "score_threshold": None}
    plain = replace(spec, **neutral)  # type: ignore[arg-type]
    return next((name for name, fields_ in _PRESETS.items() if DecodeSpec(**{**fields_, **neutral}) == plain), None)


def _read(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _query_count(config: Any) -> int | None:
    """Read the number of queries out of a config; OWL-ViT's queries are its patches."""
    vision = _read(config, "vision_config")
    side, patch = (_read(vision, name) for name in ("image_size", "patch_size"))
    patches = (side // patch) ** 2 if side and patch else None
    return _read(config, "num_queries") or _read(config, "num_detection_tokens") or patches


_SOFTMAX: dict[str, Any] = {"activation": "softmax", "background": "last", "selection": "per_query"}

_PRESETS: dict[str, dict[str, Any]] = {
    "rtdetr": {},  # also RT-DETRv2, RT-DETRv3, D-FINE, DEIM, DEIMv2
    "rfdetr": {"clip": True},
    "lwdetr": {},
    "deformable_detr": {"top_k": 100},
    "conditional_detr": {"top_k": 100},
    "dab_detr": {"top_k": 100},
    "detr": _SOFTMAX,
    "yolos": _SOFTMAX,
    "table_transformer": _SOFTMAX,
    # Text-conditioned: a class is a phrase or a token of the prompt, and each query is kept for its best one. They keep
    # all their queries; these are the most that a published checkpoint has.
    "owlvit": {"selection": "per_query", "top_k": 3600},
    "owlv2": {"selection": "per_query", "top_k": 5184},
    "grounding_dino": {"selection": "per_query", "top_k": 900},
}

# These keep 100 detections however many queries they have.
_FIXED_TOP_K = ("deformable_detr", "conditional_detr", "dab_detr")

# transformers' model_type of each family, and its preset.
_FAMILIES: dict[str, str] = {
    "rt_detr": "rtdetr",
    "rt_detr_v2": "rtdetr",
    "d_fine": "rtdetr",
    "deimv2": "rtdetr",
    "pp_doclayout_v2": "rtdetr",  # the boxes; the reading order is the library's
    "pp_doclayout_v3": "rtdetr",
    "rf_detr": "rfdetr",
    "lw_detr": "lwdetr",
    "deformable_detr": "deformable_detr",
    "conditional_detr": "conditional_detr",
    "dab-detr": "dab_detr",
    "detr": "detr",
    "yolos": "yolos",
    "table-transformer": "table_transformer",
    "owlvit": "owlvit",
    "owlv2": "owlv2",
    "grounding-dino": "grounding_dino",
    "mm-grounding-dino": "grounding_dino",
}
