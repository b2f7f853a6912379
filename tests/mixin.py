"""The questions that every public operator is asked: smoke, exception, cardinality, feature, gradcheck, dynamo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def assert_same(actual: Any, expected: Any) -> None:
    """Hold two trees of tensors to the same bits (NaN equals NaN)."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


class AsModule(nn.Module):
    """torch.export takes modules only."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Any) -> Any:
        return self.function(*arguments)


class OperatorTests:
    """Mix into a Test class that says what the operator is and what it is to be asked about."""

    operator: Callable[..., Any]  # a staticmethod

    def arguments(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """Arguments away from every tie and corner, so that the operator is smooth there."""
        raise NotImplementedError

    def output_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def cardinalities(self) -> list[tuple[tuple[Any, ...], tuple[int, ...]]]:
        """Arguments, and the shape of the first output."""
        raise NotImplementedError

    def features(self) -> list[tuple[tuple[Any, ...], Any]]:
        """Arguments, and what comes out."""
        raise NotImplementedError

    def exceptions(self) -> list[tuple[tuple[Any, ...], type[Exception], str]]:
        """Arguments, the exception, and a pattern that its message matches."""
        raise NotImplementedError

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_smoke(self, dtype):
        arguments = self.arguments(dtype)
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        before = [(value.clone(), value._version) for value in tensors]
        outputs = tree_leaves(self.operator(*arguments))
        assert outputs[0].dtype == self.output_dtype(dtype)
        assert all(value.isfinite().all() for value in outputs)
        for value, (copy, version) in zip(tensors, before, strict=True):
            assert_same(value, copy)
            assert value._version == version, "an input was written to"
            for output in outputs:
                assert output.untyped_storage().data_ptr() != value.untyped_storage().data_ptr(), "an output is a view"

    def test_exception(self):
        for arguments, kind, pattern in self.exceptions():
            with pytest.raises(kind, match=pattern) as error:
                self.operator(*arguments)
            one_line(error)

    def test_cardinality(self):
        for arguments, shape in self.cardinalities():
            assert tuple(tree_leaves(self.operator(*arguments))[0].shape) == shape

    def test_feature(self):
        for arguments, expected in self.features():
            torch.testing.assert_close(self.operator(*arguments), expected, rtol=1e-6, atol=1e-6)

    def test_gradcheck(self):
        arguments = [
            value.requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
            for value in self.arguments(torch.float64)
        ]

        def differentiable(*inputs: Any) -> tuple[Tensor, ...]:
            return tuple(value for value in tree_leaves(self.operator(*inputs)) if value.is_floating_point())

        assert torch.autograd.gradcheck(differentiable, arguments)

    def test_dynamo(self):
        torch._dynamo.reset()
        arguments = self.arguments(torch.float32)
        compiled = torch.compile(self.operator, fullgraph=True, backend="aot_eager")
        assert_same(compiled(*arguments), self.operator(*arguments))

    def test_export(self):
        arguments = self.arguments(torch.float32)
        program = torch.export.export(AsModule(self.operator), arguments)
        # What is exported takes the plain way, which may round otherwise than a kernel; whole numbers are exact.
        torch.testing.assert_close(program.module()(*arguments), self.operator(*arguments), equal_nan=True)
        mutable = [n.target for n in program.graph.nodes if n.op == "call_function" and _writes(n.target)]
        assert not mutable, mutable


def _writes(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and schema.is_mutable
