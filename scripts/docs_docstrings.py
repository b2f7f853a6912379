"""Docstrings on the docs site: Sphinx roles become links, and an ``Example:`` a code block.

An extension of griffe, named in mkdocs.yml. The source keeps the forms that ``help()`` and editors show well.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|attr):`([^`]+)`")
_EXAMPLE = re.compile(r"^(\s*)Example:(\s*)$", re.MULTILINE)


class SphinxRoles(griffe.Extension):
    """Rewrites every docstring of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Walk the package."""
        _walk(pkg)


def _walk(item: griffe.Object) -> None:
    if item.docstring is not None:
        text = _ROLE.sub(lambda match: _link(item, match.group(1)), item.docstring.value)
        item.docstring.value = _EXAMPLE.sub(r"\1Examples:\2", text)
    for member in item.members.values():
        if not member.is_alias:
            _walk(member)


def _link(item: griffe.Object, name: str) -> str:
    """Give a link where the site has a place for the name, else the name alone."""
    # Without backticks: griffe takes a docstring's Markdown as it is, and a code span would show the tag.
    return f'<autoref optional identifier="{_resolve(item, name)}"><code>{name}</code></autoref>'


def _resolve(item: griffe.Object, name: str) -> str:
    scope: griffe.Object | None = item
    while scope is not None:
        if name.split(".")[0] in scope.members:
            return _function_of(item, f"{scope.path}.{name}")
        scope = scope.parent
    return _function_of(item, name)


def _function_of(item: griffe.Object, path: str) -> str:
    """A function that has the name of its module, as ``detpost.export.attach``, where the path means the module."""
    place, name = item.package, path.rpartition(".")[2]
    for part in path.split(".")[1:]:
        found = place.members.get(part)
        if found is None or found.is_alias or not found.is_module:
            return path
        place = found
    return f"{path}.{name}" if name in place.members else path
