"""Running ONNX files in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["onnx_example_inputs", "onnx_inputs", "onnx_session"]

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


def onnx_session(
    model: bytes | str | Path,
    providers: tuple[str, ...] = ("CPUExecutionProvider",),
    folder: Path | None = None,
) -> Any:
    """Open a model in ONNX Runtime.

    Args:
        model: a path or a serialised model.
        providers: execution providers, the first that can takes each node.
        folder: where a serialised model's external weights lie.

    Returns:
        The ``InferenceSession``.

    Raises:
        ImportError: onnxruntime is missing; the message names the extra.
        OSError: no such file.
        ValueError: a model that ONNX Runtime does not take.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ImportError("running ONNX files needs onnxruntime: pip install 'detpost[onnx]'") from None
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise FileNotFoundError(f"no file {model}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # warnings about unused initialisers say nothing to a user
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.absolute()))
    try:
        return onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model), options, providers=list(providers)
        )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"ONNX Runtime does not take the model: {reason}") from error


def onnx_inputs(session: Any) -> dict[str, tuple[tuple[int | None, ...], Any]]:
    """Give the shape, ``None`` where a dimension is free, and the NumPy dtype of each input."""
    return {
        value.name: (tuple(size if isinstance(size, int) else None for size in value.shape), _DTYPES[value.type])
        for value in session.get_inputs()
    }


def onnx_example_inputs(session: Any, batch: int = 1, side: int = 640) -> dict[str, Any]:
    """Make inputs of the declared shapes and dtypes: free batch and image sizes take the values given."""
    inputs: dict[str, Any] = {}
    for value in session.get_inputs():
        shape = [
            size if isinstance(size, int) else {0: batch, 1: 3}.get(axis, side) for axis, size in enumerate(value.shape)
        ]
        inputs |= {value.name: np.zeros(shape, _DTYPES[value.type])}
    return inputs
