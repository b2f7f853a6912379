"""Notebooks as pages of the docs site, as they were last saved: nothing is run, and nothing is fetched.

A hook of MkDocs, named in mkdocs.yml. Each ``notebooks/*.ipynb`` becomes a page under *Notebooks*.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

FOLDER = Path(__file__).parents[1] / "notebooks"
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")
_IMAGES = {"image/png": "png", "image/jpeg": "jpg"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages in the navigation, as a section before the background."""
    pages = [f"notebooks/{path.stem}.md" for path in _notebooks()]
    if pages and config.nav is not None:
        place = next((i for i, entry in enumerate(config.nav) if "Background" in entry), len(config.nav))
        config.nav = [*config.nav[:place], {"Notebooks": pages}, *config.nav[place:]]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook, and its pictures."""
    for path in _notebooks():
        text, pictures = render(json.loads(path.read_text(encoding="utf-8")), path.stem)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def render(notebook: dict[str, Any], stem: str) -> tuple[str, dict[str, bytes]]:
    """Write a notebook as Markdown.

    Args:
        notebook: the parsed file, nbformat 4.
        stem: its name without the ending, for the names of its pictures.

    Returns:
        The page, and its pictures by name.
    """
    parts: list[str] = [f"*This page shows `notebooks/{stem}.ipynb` with the outputs that were saved in it.*"]
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = _joined(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(_LINK.sub(_on_the_site, source))
            continue
        if cell["cell_type"] != "code" or not source.strip():
            continue
        parts.append(_fenced(source, "python"))
        for output in cell["outputs"]:
            text, found = _output(output, f"{stem}-{len(pictures)}")
            pictures |= found
            parts += [text] if text else []
    first = next((i for i, part in enumerate(parts) if part.startswith("# ")), None)
    if first is not None:  # the title stays on top
        parts = [parts[first], *parts[:first], *parts[first + 1 :]]
    return "\n\n".join(parts) + "\n", pictures


def _on_the_site(match: re.Match[str]) -> str:
    """Point a link at the page of a notebook or of docs/; what the site does not have stays as text."""
    text, target = match.groups()
    file, _, anchor = target.partition("#")
    if "://" in target or not file:
        return match.group()
    if file.endswith(".ipynb") and "/" not in file:
        file = file.removesuffix(".ipynb") + ".md"
    elif file.startswith("../docs/") and file.endswith(".md"):
        file = "../" + file.removeprefix("../docs/")
    else:
        return text
    return f"[{text}]({file}#{anchor})" if anchor else f"[{text}]({file})"


def _output(output: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    if output["output_type"] == "stream":
        return _fenced(_joined(output["text"]), "text"), {}
    if output["output_type"] == "error":
        return _fenced("\n".join(output["traceback"]), "text"), {}
    data = output["data"]
    for kind, ending in _IMAGES.items():
        if kind in data:
            file = f"{name}.{ending}"
            return f"![output]({file})", {file: base64.b64decode(_joined(data[kind]))}
    if "image/svg+xml" in data:
        return f"![output]({name}.svg)", {f"{name}.svg": _joined(data["image/svg+xml"]).encode()}
    if "text/markdown" in data:
        return _joined(data["text/markdown"]), {}
    if "text/html" in data and "<table" in _joined(data["text/html"]):
        return _joined(data["text/html"]), {}
    return (_fenced(_joined(data["text/plain"]), "text") if "text/plain" in data else ""), {}


def _fenced(text: str, language: str) -> str:
    clean = _ESCAPES.sub("", text).rstrip()
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", clean)), default=0))
    return f"{fence}{language}\n{clean}\n{fence}" if clean else ""


def _joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def _notebooks() -> list[Path]:
    return sorted(FOLDER.glob("*.ipynb"))
