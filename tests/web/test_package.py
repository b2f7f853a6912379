"""The npm package: the same cases in Node.js and in Chromium, against Python's answers."""

import filecmp
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from detpost.images import _resizes_bytes
from detpost.web.runtime import RUNTIME_VERSION
from detpost.web.site import PAGE

WEB = Path(__file__).parents[2] / "web"
COMPILER = WEB / "node_modules" / ".bin" / "tsc"
PACKAGE = json.loads((WEB / "package.json").read_text())

needs_node = pytest.mark.skipif(
    shutil.which("node") is None or not COMPILER.exists(), reason="no Node.js, or no web/node_modules: `make web-test`"
)
# Resized pixels are compared to the bit with what torchvision does on such processors.
needs_byte_resize = pytest.mark.skipif(not _resizes_bytes(), reason="torchvision resizes floats on this processor")


def build(config, *options):
    done = subprocess.run([str(COMPILER), "-p", config, *options], cwd=WEB, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout


@needs_node
def test_the_page_in_the_package_is_what_its_source_builds(tmp_path):
    build("tsconfig.page.json", "--outDir", str(tmp_path))
    built = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.js"))
    there = sorted(path.relative_to(PAGE) for folder in ("src", "page") for path in (PAGE / folder).rglob("*.js"))
    assert built == there
    assert len(built) > 8
    assert filecmp.cmpfiles(tmp_path, PAGE, map(str, built), shallow=False)[0] == [str(path) for path in built]


@pytest.mark.slow
@needs_node
@needs_byte_resize
def test_the_package_keeps_its_promises_in_node(package_files):
    build("tsconfig.json")
    done = subprocess.run(
        ["node", "--test", "tests/node.test.mjs"],
        cwd=WEB,
        env={**os.environ, "DETPOST_FILES": package_files},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r"pass (\d+)", done.stdout).group(1)) > 20, done.stdout[-1000:]


@pytest.mark.slow
@needs_byte_resize
def test_the_package_keeps_its_promises_in_a_browser(package_files, browser):
    browser.open(f"{package_files}disk.js")  # a page of this address on which nothing else runs
    failed = browser.run(
        """async (base) => {
          const [api, resize, tensors, { cases }] = await Promise.all(
            ["src/index.js", "src/resize.js", "src/tensors.js", "cases.mjs"].map((name) => import(base + name)),
          );
          const ort = await import(base + "ort/ort.wasm.min.mjs");
          ort.env.wasm.wasmPaths = base + "ort/";
          ort.env.wasm.proxy = true; // as the page has it: in a worker, which takes arrays away
          const all = await cases({ ...api, ...resize, ...tensors }, base, async () => ort);
          const failed = [["how many", all.length > 20 ? null : String(all.length)]];
          for (const [name, run] of all) failed.push([name, await run().then(() => null, (error) => String(error))]);
          return failed.filter(([, error]) => error);
        }""",
        package_files,
    )
    assert failed == []


def test_the_package_has_one_dependency_and_exact_versions():
    assert "dependencies" not in PACKAGE
    assert list(PACKAGE["peerDependencies"]) == ["onnxruntime-web"]
    for name, version in PACKAGE["devDependencies"].items():
        assert re.fullmatch(r"\d+\.\d+\.\d+", version), name
    assert PACKAGE["devDependencies"]["onnxruntime-web"] == RUNTIME_VERSION
    assert not (WEB / "package-lock.json").exists()


@needs_node
def test_what_npm_packs_is_the_built_package(tmp_path):
    if shutil.which("npm") is None:
        pytest.skip("no npm")
    done = subprocess.run(["npm", "pack", "--json", "--dry-run"], cwd=WEB, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    packed = {file["path"] for file in json.loads(done.stdout[done.stdout.index("[\n") :])[0]["files"]}
    assert {"package.json", "README.md", "dist/index.js", "dist/index.d.ts"} <= packed
    assert all(path.startswith("dist/") or path in ("package.json", "README.md", "LICENSE") for path in packed)
