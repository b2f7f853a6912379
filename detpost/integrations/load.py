"""Loading a detector by its name, whichever library it is of."""

from __future__ import annotations

from pathlib import Path

from detpost.integrations.loaded import LoadedDetector
from detpost.integrations.model_names import look_up
from detpost.integrations.packages import load_package_model, package_model

__all__ = ["load_detector"]


def load_detector(source: str | Path, *, trust_remote_code: bool = False, allow_pickle: bool = False) -> LoadedDetector:
    """Load a detector, in float32 and evaluation mode.

    Args:
        source: what :func:`detpost.integrations.transformers.load_detector` takes, or ``LIBRARY:MODEL`` as of
            :mod:`detpost.integrations.packages`.
        trust_remote_code: whether Python code that comes with a transformers detector's weights is run.
        allow_pickle: whether files of weights that are pickles may be opened.

    Returns:
        The detector.

    Raises:
        ImportError: a library is not installed; the message says how it is.
        OSError: nothing at that place, or files that cannot be read or do not fit.
        ValueError: not a detector, a family without a preset, code or a pickle that is not trusted.
    """
    look_up(source)
    named = package_model(source)
    if named is not None:
        loaded: LoadedDetector = load_package_model(named, allow_pickle)
        return loaded
    from detpost.integrations.transformers import load_detector as load_transformers

    return load_transformers(source, trust_remote_code=trust_remote_code)
