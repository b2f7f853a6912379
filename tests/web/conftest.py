import shutil

import pytest

from detpost.export import to_onnx
from detpost.web import write_site
from detpost.zoo import sample_images
from scripts.browser import RUNTIME, browsing, missing, serving
from tests.web.package_files import write_package_files


@pytest.fixture(scope="session")
def needs_browser():
    """Skip where there is no browser, or no ONNX Runtime Web."""
    if reason := missing():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Give the path of tiny.onnx, with queries."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.onnx"
    to_onnx("tiny", path, queries=True)
    return path


@pytest.fixture(scope="session")
def site(needs_browser, tiny, tmp_path_factory):
    """Give the address of the page of tiny."""
    folder = tmp_path_factory.mktemp("site")
    write_site(tiny, folder, runtime=RUNTIME, examples=sample_images()[:2])
    with serving(folder) as address:
        yield address


@pytest.fixture(scope="session")
def package_files(tmp_path_factory):
    """Give the address of a page's folder that has the files of the package's cases too."""
    if not RUNTIME.is_dir():
        pytest.skip("no web/node_modules: `make web-test` installs it")
    folder = tmp_path_factory.mktemp("package")
    write_package_files(folder)
    write_site(folder / "tiny.onnx", folder, runtime=RUNTIME)
    shutil.copy(RUNTIME.parents[2] / "tests" / "cases.mjs", folder)
    with serving(folder) as address:
        yield address


@pytest.fixture(scope="session")
def browser(needs_browser):
    """Give a browser."""
    with browsing() as browser:
        yield browser
