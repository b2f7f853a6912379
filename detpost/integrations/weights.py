"""Weights of other libraries: read as tensors alone, and put into a network that must take every one of them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["check_pickle", "classes_of", "in_one_line", "put_weights", "read_weights"]

# Where training code keeps the weights in its checkpoints: the averaged ones first.
_NESTS = (("ema", "module"), ("ema",), ("model",), ("state_dict",))


def check_pickle(source: str, allow_pickle: bool) -> None:
    """Refuse a pickle that nobody vouched for.

    Args:
        source: the file, or the model that is published as one.
        allow_pickle: whether somebody did.

    Raises:
        ValueError: nobody did.
    """
    if not allow_pickle:
        raise ValueError(
            f"{source} is a pickle, which may run code when it is opened: if you trust it take --allow-pickle "
            "(allow_pickle=True), or save its state_dict as .safetensors"
        )


def read_weights(path: Path, allow_pickle: bool) -> dict[str, Tensor]:
    """Read the parameters in a file by their names.

    Args:
        path: a ``.safetensors`` file, or a checkpoint of PyTorch's, of which tensors and plain containers are read.
        allow_pickle: whether the latter may be opened.

    Returns:
        The parameters; of a checkpoint the averaged ones where it has them.

    Raises:
        ImportError: safetensors is not installed.
        OSError: a file that cannot be read, or without weights.
        ValueError: a pickle without ``allow_pickle``.
    """
    if path.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError:
            raise ImportError("a .safetensors file needs safetensors: pip install 'detpost[hf]'") from None
        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise OSError(f"cannot read {path}: {in_one_line(error)}") from error
    check_pickle(str(path), allow_pickle)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise OSError(f"cannot read {path} as tensors alone: {in_one_line(error)}") from error
    return _parameters(held, path)


def _parameters(held: Any, path: Path) -> dict[str, Tensor]:
    for nest in ((), *_NESTS):
        inner = held
        for name in nest:
            inner = inner.get(name) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping) and inner and all(isinstance(value, Tensor) for value in inner.values()):
            return dict(inner)
    raise OSError(f"{path} holds no parameters by name, neither itself nor under ema.module, model or state_dict")


def classes_of(weights: Mapping[str, Tensor], ending: str, path: Path) -> int:
    """Count the classes by the rows of a head's weight.

    Raises:
        OSError: there is no such weight.
    """
    found = next((value for name, value in weights.items() if name.endswith(ending)), None)
    if found is None:
        raise OSError(f"{path} has no parameter {ending}: it is of another network")
    return int(found.shape[0])


def put_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Put weights into a network.

    Raises:
        OSError: one that it lacks, or that it has no place for, or of another shape.
    """
    own = model.state_dict()
    for kind, names in (("lacks", own.keys() - weights.keys()), ("has too many", weights.keys() - own.keys())):
        if names:
            raise OSError(f"{path} does not fit: it {kind} {len(names)} parameters, the first is {min(names)}")
    other = sorted(name for name in own if own[name].shape != weights[name].shape)
    if other:
        shapes = tuple(weights[other[0]].shape), tuple(own[other[0]].shape)
        raise OSError(f"{path} does not fit: {other[0]} has shape {shapes[0]}, the network's has {shapes[1]}")
    model.load_state_dict(dict(weights))


def in_one_line(error: BaseException) -> str:
    """Give the first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
