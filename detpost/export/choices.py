"""Options of which each is one of a few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["check_choices"]


def check_choices(choices: Mapping[str, tuple[Any, Sequence[Any]]], of: str = "") -> None:
    """Refuse what is none of the choices.

    Args:
        choices: by the name of an option, its value and what it may be.
        of: whose options they are, where the name alone does not say it.

    Raises:
        ValueError: the first that is none of its choices.

    Example:
        >>> check_choices({"ties": ("exact", ("exact", "onnx"))})
    """
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            whose = f"{name} of {of}" if of else name
            raise ValueError(f"{whose} must be one of {', '.join(map(str, allowed))}; got {value!r}")
