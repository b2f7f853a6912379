"""The site: the page's own files, a model, its weights and examples, and ONNX Runtime Web, put into one folder."""

from __future__ import annotations

import json
import mmap
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from detpost.export.formats import format_of
from detpost.web.runtime import RUNTIME_FILES, runtime_folder

__all__ = ["WrittenSite", "write_site"]

PAGE = Path(__file__).parent / "static"


@dataclass(frozen=True)
class WrittenSite:
    """What :func:`write_site` wrote.

    Args:
        folder: of the site; ``index.html`` in it is the page.
        model: in it.
        size: of all files, bytes.
        notes: what the caller should know.
    """

    folder: Path
    model: Path
    size: int
    notes: tuple[str, ...] = ()


def write_site(
    model: str | Path,
    out: str | Path,
    *,
    runtime: str | Path | None = None,
    examples: Sequence[str | Path] = (),
    progress: Callable[[str], None] | None = None,
) -> WrittenSite:
    """Write a static page that runs a detector in the browser, and loads nothing from elsewhere.

    Args:
        model: an ``.onnx`` file that detpost wrote; weights in files beside it are taken along.
        out: folder of the site; what else is in it stays.
        runtime: folder with the npm package ``onnxruntime-web``, or its ``dist``; by default that of the
            cache, which npm fills once.
        examples: images that the page offers; it starts with the first.
        progress: called with one line before each step.

    Returns:
        What was written.

    Raises:
        OSError: a file that is missing, or ONNX Runtime Web that is not to be had.
        ValueError: a model of another format, or two examples of one name.
    """
    say = progress or (lambda _: None)
    model, out = Path(model), Path(out)
    if format_of(model).name != "onnx":
        raise ValueError(f"a page runs .onnx files; got {model.name!r}: write one with `detpost export`")
    pictures = [Path(example) for example in examples]
    for path in (model, *pictures):
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}")
    twice = next((one.name for one in pictures if [each.name for each in pictures].count(one.name) > 1), None)
    if twice is not None:
        raise ValueError(f"two examples are called {twice}: rename one")
    folder = runtime_folder(None if runtime is None else Path(runtime), say)
    say("writing the page")
    shutil.copytree(PAGE, out, dirs_exist_ok=True)
    copies = {out / "ort" / name: folder / name for name in RUNTIME_FILES}
    copies |= {out / path.name: path for path in (model, *format_of(model).files_beside(model))}
    copies |= {out / "examples" / path.name: path for path in pictures}
    for target, source in copies.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (target.exists() and target.samefile(source)):
            shutil.copyfile(source, target)
    told = {"model": quote(model.name), "examples": [f"examples/{quote(path.name)}" for path in pictures]}
    (out / "site.json").write_text(json.dumps(told) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return WrittenSite(out, out / model.name, size, _notes(model))


def _notes(model: Path) -> tuple[str, ...]:
    if _says_how_it_decodes(model):
        return ()
    return (f"{model} was not written by detpost, and the page will say so: `detpost attach {model} -o OUT` first",)


def _says_how_it_decodes(model: Path) -> bool:
    """Look for the name of the property: reading the file for good takes a package that is not needed here."""
    if model.stat().st_size == 0:
        return False
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"detpost.spec") >= 0
