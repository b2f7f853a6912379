"""Images at the addresses of web servers: fetched once into the folder of the results, and files from then on."""

from __future__ import annotations

import contextlib
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterable
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["FETCHED", "fetched"]

FETCHED = "fetched"
_SECONDS = 30.0
_MOST_BYTES = 2 * 1024**3
_PIECE = 1 << 20


def fetched(sources: Iterable[str | Path], out: str | Path) -> list[str | Path]:
    """Put files in the place of ``http://`` and ``https://`` addresses among sources of images.

    A file goes to ``OUT/fetched/HOST/PATH``, whole or not at all; one that is there is not fetched again.

    Args:
        sources: folders, files, patterns and addresses.
        out: the folder for the results.

    Returns:
        The sources, in their order.

    Raises:
        OSError: an address that gives no file: the message names it and says why.
        ValueError: an address of another scheme, or with a name and password in it.
    """
    return [
        _fetched(source, Path(out) / FETCHED) if isinstance(source, str) and "://" in source else source
        for source in sources
    ]


def _fetched(address: str, folder: Path) -> Path:
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise ValueError(f"{address} is no address: {error}") from None
    if parts.scheme.lower() not in ("http", "https"):
        raise ValueError(f"{address} is an address of {parts.scheme}: --engine ray reads folders there")
    query = f"?{parts.query}".replace("/", "_") if parts.query else ""
    if "@" in parts.netloc:
        raise ValueError(f"the address of {parts.hostname} has a name or password in it, which is not taken")
    steps = unquote(f"{parts.netloc.replace(':', '_')}/{parts.path}{query}").replace("\0", "_").split("/")
    path = folder.joinpath(*(step[-200:] for step in steps if step not in ("", ".", "..")))
    if path.is_file():
        return path
    part = path.with_name(f".{uuid.uuid4().hex}")
    try:
        with urllib.request.urlopen(address, timeout=_SECONDS) as answer:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                while piece := answer.read(_PIECE):
                    file.write(piece)
                    if file.tell() > _MOST_BYTES:
                        raise OSError(f"more than {_MOST_BYTES:,} bytes")
            if answer.length:
                raise OSError(f"the connection ended {answer.length:,} bytes too early")
        part.replace(path)
    except (OSError, HTTPException, ValueError) as error:
        why = error.reason if isinstance(error, urllib.error.URLError) and error.reason else error
        raise OSError(f"cannot fetch {address}: {' '.join(str(why).split()) or type(error).__name__}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return path
