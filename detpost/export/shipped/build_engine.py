"""Build a TensorRT engine: ``python build_engine.py MODEL.onnx -o MODEL.plan --max-batch 8``.

Needs ``tensorrt``, 10 or later. The network is strongly typed: it computes in the types that the file says, so float32
stays float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def filled(shape: Sequence[int], batch: int, sides: tuple[int, int]) -> tuple[int, ...]:
    """Fill the free dimensions (-1) of an input: the batch, then height and width of images."""
    free = {0: batch, 2: sides[0], 3: sides[1]}
    return tuple(free[place] if dim == -1 else dim for place, dim in enumerate(shape))


def build(trt: Any, source: Path, batches: tuple[int, int, int], sides: tuple[int, int], workspace: int) -> Any:
    """Parse a file and build an engine of it; least, usual and greatest batch in one profile."""
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    # From TensorRT 11 on every network is strongly typed, and the flag may be gone.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(source)):
        reasons = "; ".join(str(parser.get_error(place)) for place in range(parser.num_errors))
        raise SystemExit(f"error: {source} cannot be parsed: {reasons}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace << 20)
    inputs = [network.get_input(place) for place in range(network.num_inputs)]
    if any(-1 in tuple(value.shape) for value in inputs):
        profile = builder.create_optimization_profile()
        for value in inputs:
            profile.set_shape(value.name, *(filled(tuple(value.shape), batch, sides) for batch in batches))
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise SystemExit(f"error: no engine could be built of {source}")
    return engine


def main(arguments: Sequence[str] | None = None) -> None:
    """Build and write."""
    parser = argparse.ArgumentParser(description="Build a TensorRT engine of an ONNX file.")
    parser.add_argument("source", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1, help="what the engine is tuned for")
    parser.add_argument("--side", type=int, nargs=2, default=(640, 640), help="height and width, where they are free")
    parser.add_argument("--workspace", type=int, default=4096, help="MiB")
    given = parser.parse_args(arguments)
    import tensorrt

    batches = (1, given.batch, max(given.batch, given.max_batch))
    engine = build(tensorrt, given.source, batches, tuple(given.side), given.workspace)
    given.out.write_bytes(engine)


if __name__ == "__main__":
    main()
