"""A detector as a static page: the files of the page, ONNX Runtime Web, and a server for this machine."""

from __future__ import annotations

from detpost.web.serve import serve
from detpost.web.site import WrittenSite, write_site

__all__ = ["WrittenSite", "serve", "write_site"]
