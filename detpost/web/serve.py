"""A server for one site on this machine, with the headers that let the page use threads."""

from __future__ import annotations

import functools
import http.server
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["PageServer", "serve"]

HOST = "127.0.0.1"
PORT = 8000

# An isolated page may share memory between threads. Nothing of the site is for other sites.
_HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


class _Handler(http.server.SimpleHTTPRequestHandler):
    # Not asked of the system, whose tables may lack or change them: browsers refuse modules of another type.
    extensions_map = {  # noqa: RUF012
        "": "application/octet-stream",
        ".html": "text/html; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".mjs": "text/javascript; charset=utf-8",
        ".json": "application/json",
        ".svg": "image/svg+xml",
        ".png": "image/png",
        ".jpg": "image/jpeg",
        ".jpeg": "image/jpeg",
        ".webp": "image/webp",
        ".wasm": "application/wasm",
    }
    protocol_version = "HTTP/1.1"

    def end_headers(self) -> None:
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def list_directory(self, path: Any) -> None:
        self.send_error(404, "no such page")

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal is for what goes wrong."""


class PageServer(http.server.ThreadingHTTPServer):
    """Serves a folder to this machine alone.

    Args:
        folder: the site.
        port: wanted; another one where it is taken. 0 takes any.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int = PORT) -> None:
        handler = functools.partial(_Handler, directory=str(folder))
        try:
            super().__init__((HOST, port), handler)
        except OSError:
            super().__init__((HOST, 0), handler)

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Let a browser that goes away go."""


def serve(folder: Path, say: Callable[[str], None], browser: bool = True) -> None:
    """Serve a site to this machine until it is interrupted.

    Args:
        folder: of :func:`detpost.web.write_site`.
        say: called with the line that says where.
        browser: whether the page is opened in the user's browser.
    """
    with PageServer(folder) as server:
        say(f"{server.address} (stop with Ctrl-C)")
        if browser:
            webbrowser.open(server.address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("stopped")
