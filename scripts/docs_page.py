"""The front page of the docs tries the shipped detector in the browser, where ONNX Runtime Web is to be had.

A hook of MkDocs, named in mkdocs.yml. ONNX Runtime Web is taken from ``web/node_modules`` or the user's cache, and
nothing is fetched; where neither has it, the front page keeps its picture. As a script, fills the cache by npm.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

from detpost.export import to_onnx
from detpost.web import write_site
from detpost.web.runtime import cached_runtime, runtime_folder
from detpost.zoo import sample_images

ROOT = Path(__file__).parents[1]
INSTALLED = ROOT / "web" / "node_modules" / "onnxruntime-web"
FOLDER = "try"

_PICTURE = re.compile(r"^!\[[^\]]*\]\(assets/demo\.png\).*?$", re.MULTILINE)
_FRAME = (
    f'<iframe class="try" src="{FOLDER}/index.html" title="The shipped digit detector, to be tried" loading="lazy" '
    'allow="camera"></iframe>\n\n'
    f'The shipped detector of handwritten digits, <a href="{FOLDER}/index.html">in this browser</a>: take an example, '
    "or an image of your own. [How such a page is made](web.md)."
)


def runtime() -> Path | None:
    """Find ONNX Runtime Web; ``None`` where it is not on this machine."""
    return runtime_folder(INSTALLED) if INSTALLED.is_dir() else cached_runtime()


def embedded(markdown: str) -> str:
    """Put the page where the picture is."""
    found, count = _PICTURE.subn(_FRAME, markdown)
    if count != 1:
        raise ValueError(f"docs/index.md must have the picture assets/demo.png once; got {count}")
    return found


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Embed the page into the front page, where it can be built."""
    return embedded(markdown) if page.file.src_uri == "index.md" and runtime() else markdown


def on_post_build(config: MkDocsConfig) -> None:
    """Build the page into the site."""
    if folder := runtime():
        with tempfile.TemporaryDirectory() as name:
            model = to_onnx("tiny", Path(name) / "tiny.onnx", exporter="torchscript").path
            write_site(model, Path(config.site_dir) / FOLDER, runtime=folder, examples=sample_images())


if __name__ == "__main__" and runtime() is None:
    try:
        runtime_folder(say=print)
    except OSError as error:
        print(f"the front page keeps its picture: {error}", file=sys.stderr)
