"""Every option of every command on the docs site: what ``--help`` says, under the table of the commands.

A hook of MkDocs, named in mkdocs.yml. Typer's own generator writes the text.
"""

from __future__ import annotations

import subprocess
import sys

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

PAGE = "reference/command.md"
_GENERATOR = ("-m", "typer", "detpost.command.cli", "utils", "docs", "--name", "detpost")


def options() -> str:
    """Give a section for each command, in Markdown."""
    done = subprocess.run([sys.executable, *_GENERATOR], capture_output=True, text=True, encoding="utf-8", check=True)
    _, heading, sections = done.stdout.partition("\n## ")  # what comes before is said by the page itself
    if not heading:
        raise ValueError(f"Typer's generator gave no command: {done.stdout[:200]!r}")
    return heading.lstrip() + sections


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the options below the page's own text."""
    return f"{markdown}\n{options()}" if page.file.src_uri == PAGE else markdown
