"""Running ONNX files in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["onnx_inputs", "onnx_session", "onnx_values"]

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


def onnx_values(model: Any, names: list[str], folder: Path | None = None, side: int = 640) -> dict[str, Any]:
    """Run a model once on a random image and give values of its main graph, outputs or not.

    Args:
        model: the ``ModelProto``; unchanged afterwards.
        names: the values.
        folder: where its external weights lie.
        side: size of images where the model leaves it free. Whatever else looks like sizes is filled with it.

    Returns:
        A NumPy array by name; values that are no tensors are left out.

    Raises:
        ImportError: onnxruntime is missing; the message names the extra.
        ValueError: a model that ONNX Runtime does not take or cannot run.
    """
    outputs = list(model.graph.output)
    del model.graph.output[:]
    try:
        for name in names:
            model.graph.output.add(name=name)
        session = onnx_session(model.SerializeToString(), folder=folder)
    finally:
        del model.graph.output[:]
        model.graph.output.extend(outputs)
    try:
        values = session.run(names, _random_inputs(session, side))
    except Exception as error:
        raise ValueError(f"ONNX Runtime cannot run the model: {str(error).strip().splitlines()[0]}") from error
    return {name: value for name, value in zip(names, values, strict=True) if isinstance(value, np.ndarray)}


def _random_inputs(session: Any, side: int) -> dict[str, Any]:
    """Make an image of noise, and for each other input what such inputs hold: sizes, masks of ones, zeros."""
    generator = np.random.default_rng(0)
    kinds = onnx_inputs(session)
    side = max((size or side for shape, _ in kinds.values() if len(shape) == 4 for size in shape[2:]), default=side)
    free = {2: (1, 2), 4: (1, 3, side, side)}

    def fill(name: str, shape: tuple[int | None, ...], dtype: Any) -> Any:
        usual = free.get(len(shape), (1, *[side] * len(shape)))
        sizes = [usual[axis] if size is None else size for axis, size in enumerate(shape)]
        if len(sizes) == 4:
            return (generator.random(sizes) * (255 if dtype == np.uint8 else 1)).astype(dtype)
        is_size = len(sizes) == 2 and sizes[1] == 2
        return np.full(sizes, side if is_size else "mask" in name.lower(), dtype)

    return {name: fill(name, *kind) for name, kind in kinds.items()}
