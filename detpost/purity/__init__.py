"""Find what a compiler, an exporter or autograd will trip over: in-place writes, breaks, waits and moving shapes.

The dynamic half (``check``, ``assert_pure``) runs a function on copies of its inputs; the static half
(``check_source``, ``check_paths``) reads source. Names are loaded when they are used, so that the pytest plugin and
the static half do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detpost.purity.checker import STAGES, assert_pure, check
    from detpost.purity.report import Finding, PurityReport
    from detpost.purity.rules import RULES, Rule
    from detpost.purity.static import check_paths, check_source

_HOMES = {
    **dict.fromkeys(("STAGES", "assert_pure", "check"), "checker"),
    **dict.fromkeys(("Finding", "PurityReport"), "report"),
    **dict.fromkeys(("RULES", "Rule"), "rules"),
    **dict.fromkeys(("check_paths", "check_source"), "static"),
}

__all__ = ["RULES", "STAGES", "Finding", "PurityReport", "Rule", "assert_pure", "check", "check_paths", "check_source"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"detpost.purity.{_HOMES[name]}"), name)
