"""The pytest plugin: the `purity` fixture and the `purity` marker.

::

    def test_pure(purity):
        purity(MyModule(), x)


    @pytest.mark.purity(allow=["DP010"], gradcheck=True)
    def test_pure_but_for_one_wait(purity):
        purity(MyModule(), x)

Nothing of the checker, and no torch, is imported before a test asks for the fixture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from detpost.purity.report import PurityReport


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, so that ``--strict-markers`` knows it."""
    config.addinivalue_line(
        "markers",
        "purity(allow=(), gradcheck=False, only=None): what the purity fixture accepts and runs in this test",
    )


@pytest.fixture
def purity(request: pytest.FixtureRequest) -> Callable[..., PurityReport]:
    """Give a function like ``detpost.purity.assert_pure``, with the marker's keywords as defaults.

    Returns:
        The function: it fails the test with the report if the checker finds an error, and returns the report if not.
    """
    from detpost.purity import assert_pure

    defaults: dict[str, Any] = {}
    for marker in reversed(list(request.node.iter_markers("purity"))):  # the closest one last, so that it decides
        defaults.update(marker.kwargs)

    def assert_subject_is_pure(subject: Callable[..., Any], /, *args: Any, **kwargs: Any) -> PurityReport:
        __tracebackhide__ = True
        try:
            return assert_pure(subject, *args, **{**defaults, **kwargs})
        except AssertionError as error:
            pytest.fail(str(error), pytrace=False)

    return assert_subject_is_pure
