"""Finds what a compiler, an exporter or autograd will trip over: in-place writes, breaks, waits and moving shapes.

The dynamic half (``check``, ``assert_pure``) runs a function on copies of its inputs; the static half
(``check_source``, ``check_paths``) reads source. Names are loaded when they are used, so that the pytest plugin and
the static half do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detpost.purity.checker import STAGES as STAGES
    from detpost.purity.checker import assert_pure as assert_pure
    from detpost.purity.checker import check as check
    from detpost.purity.report import Finding as Finding
    from detpost.purity.report import PurityReport as PurityReport
    from detpost.purity.rules import RULES as RULES
    from detpost.purity.rules import Rule as Rule
    from detpost.purity.static import check_paths as check_paths
    from detpost.purity.static import check_source as check_source

_HOMES = {
    "STAGES": "checker",
    "assert_pure": "checker",
    "check": "checker",
    "Finding": "report",
    "PurityReport": "report",
    "RULES": "rules",
    "Rule": "rules",
    "check_paths": "static",
    "check_source": "static",
}

__all__ = [
    "RULES",
    "STAGES",
    "Finding",
    "PurityReport",
    "Rule",
    "assert_pure",
    "check",
    "check_paths",
    "check_source",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"detpost.purity.{_HOMES[name]}"), name)
