"""ONNX Runtime Web: the files of it that the page loads, from a folder, the cache or npm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

__all__ = ["RUNTIME_FILES", "RUNTIME_VERSION", "cached_runtime", "runtime_folder"]

RUNTIME_VERSION = "1.30.0"  # as web/package.json has it

RUNTIME_FILES = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
"""The first three for WebAssembly, the others for WebGPU: a browser loads one half of them."""

_PACKAGE = f"onnxruntime-web@{RUNTIME_VERSION}"
_NPM_SECONDS = 600


def runtime_folder(given: Path | None = None, say: Callable[[str], None] | None = None) -> Path:
    """Find the folder that has ONNX Runtime Web.

    Args:
        given: the package ``onnxruntime-web``, or its ``dist``; ``None`` takes what is in the cache,
            and asks npm once where there is nothing.
        say: called with one line before npm is asked.

    Returns:
        The folder with ``RUNTIME_FILES``.

    Raises:
        FileNotFoundError: the folder lacks some of them, or there is no npm.
        OSError: npm does not give the package.
    """
    if given is not None:
        folder = next((each for each in (given, given / "dist") if _is_whole(each)), None)
        if folder is None:
            raise FileNotFoundError(
                f"{given} does not have {', '.join(_lacking(given))}: name a folder of the npm package {_PACKAGE}"
            )
        return folder
    cached = _cache()
    if not _is_whole(cached):
        if say is not None:
            say(f"fetching {_PACKAGE} by npm, once")
        _fetch(cached)
    return cached


def cached_runtime() -> Path | None:
    """Give the folder of the cache where it has ONNX Runtime Web."""
    return _cache() if _is_whole(_cache()) else None


def _cache() -> Path:
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "detpost" / f"onnxruntime-web-{RUNTIME_VERSION}"


def _lacking(folder: Path) -> list[str]:
    return [name for name in RUNTIME_FILES if not (folder / name).is_file()]


def _is_whole(folder: Path) -> bool:
    return not _lacking(folder)


def _fetch(target: Path) -> None:
    """Let npm fetch the package, which checks what it got, and keep the files that a page loads."""
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(
            f"a page needs {_PACKAGE}, and there is no npm to fetch it: install Node.js, or say --runtime FOLDER"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".onnxruntime-web.", dir=target.parent) as name:
        folder = Path(name)
        try:
            # One more try, soon: without network npm would keep trying for a minute.
            patience = ("--fetch-retries=1", "--fetch-retry-mintimeout=1000")
            done = subprocess.run(
                [npm, "pack", "--silent", *patience, _PACKAGE],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=_NPM_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise OSError(f"npm did not give {_PACKAGE} within {_NPM_SECONDS} seconds: say --runtime FOLDER") from None
        archive = next(folder.glob("*.tgz"), None)
        if done.returncode or archive is None:
            reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]
            raise OSError(f"npm does not give {_PACKAGE} ({reason}): say --runtime FOLDER")
        kept = folder / "kept"
        kept.mkdir()
        with tarfile.open(archive) as packed:
            for file in RUNTIME_FILES:
                content = packed.extractfile(f"package/dist/{file}")
                assert content is not None
                with content, (kept / file).open("wb") as out:
                    shutil.copyfileobj(content, out)
        if not _is_whole(target):  # another process may have been quicker
            shutil.rmtree(target, ignore_errors=True)
            os.replace(kept, target)
