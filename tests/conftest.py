import os

import pytest
import torch
from hypothesis import settings

# The same examples in every run, so that a red build is a change and not a draw; HYPOTHESIS_PROFILE=explore draws anew.
settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_configure():
    # Two cores are shared by as many workers; alone, one process has both, unless it is told to take one.
    alone = int(os.environ.get("OMP_NUM_THREADS") or 2)
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else alone)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def exporter_order():
    """Export networks in a tenth of the time, as the newer exporter has tests of its own; give the order of users."""
    import detpost.export.onnx as module

    with pytest.MonkeyPatch.context() as patch:
        order = module._ORDER
        patch.setattr(module, "_ORDER", ("torchscript", "dynamo"))
        yield order


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
