"""What `detpost web` writes and serves, without a browser."""

import http.client
import json
import re
import shutil
import socket
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from detpost.command.cli import main
from detpost.web import WrittenSite, write_site
from detpost.web.runtime import RUNTIME_FILES, cached_runtime, runtime_folder
from detpost.web.serve import PageServer
from detpost.web.site import PAGE
from detpost.zoo import sample_images


@pytest.fixture
def runtime(tmp_path):
    """Make a folder that has the names of ONNX Runtime Web's files."""
    folder = tmp_path / "onnxruntime-web" / "dist"
    folder.mkdir(parents=True)
    for name in RUNTIME_FILES:
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def model(tmp_path):
    """Make a file that has the name of the property, and weights beside it."""
    path = tmp_path / "my model.onnx"
    path.write_bytes(b"...detpost.spec...")
    path.with_name("my model.onnx.data").write_bytes(b"weights")
    return path


def test_the_site_has_the_page_the_model_its_weights_the_examples_and_the_runtime(tmp_path, runtime, model):
    out = tmp_path / "out" / "site"
    written = write_site(model, out, runtime=runtime.parent, examples=sample_images()[:2])
    assert isinstance(written, WrittenSite)
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    page = {path.relative_to(PAGE).as_posix() for path in PAGE.rglob("*") if path.is_file()}
    assert {"index.html", "page.css", "page/page.js", "src/index.js"} <= page
    examples = {f"examples/{path.name}" for path in sample_images()[:2]}
    assert files == page | {"site.json", model.name, f"{model.name}.data"} | examples | {
        f"ort/{name}" for name in RUNTIME_FILES
    }
    told = json.loads((out / "site.json").read_text())
    assert told == {"model": "my%20model.onnx", "examples": ["examples/garden.png", "examples/lake.png"]}
    assert written.size == sum((out / name).stat().st_size for name in files)
    assert written.notes == ()
    # Again, with another model, over what is there; from the cache's own form of the folder.
    other = shutil.copy(model, tmp_path / "other.onnx")
    write_site(other, out, runtime=runtime)
    assert json.loads((out / "site.json").read_text()) == {"model": "other.onnx", "examples": []}
    write_site(out / "other.onnx", out, runtime=out / "ort")  # its own files are no fault


def test_nothing_in_the_page_points_elsewhere():
    addresses = {
        (path.name, address)
        for path in PAGE.rglob("*")
        if path.is_file()
        for address in re.findall(r"(?:https?:)?//[\w.-]+\.\w+[\w./]*", path.read_text())
    }
    assert {address for _, address in addresses} == {"http://www.w3.org/2000/svg"}  # a name, not a place


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"model": "missing.onnx"}, FileNotFoundError, "no file .*missing.onnx"),
        ({"model": "model.pt2"}, ValueError, r"a page runs .onnx files; got 'model.pt2'"),
        ({"model": "model.txt"}, ValueError, "a file must end in"),
        ({"examples": ["missing.png"]}, FileNotFoundError, "no file missing.png"),
        ({"examples": [sample_images()[0]] * 2}, ValueError, "two examples are called garden.png: rename one"),
        ({"runtime": "nowhere"}, FileNotFoundError, "nowhere does not have ort.wasm.min.mjs, .* onnxruntime-web@"),
    ],
)
def test_what_is_missing_is_named_before_anything_is_written(tmp_path, runtime, model, change, kind, said):
    with pytest.raises(kind, match=said):
        write_site(**{"model": model, "out": tmp_path / "out", "runtime": runtime, **change})
    assert not (tmp_path / "out").exists()


def test_the_runtime_comes_from_npm_once(tmp_path, runtime, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    archive = tmp_path / "made.tgz"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(runtime, "package/dist")
    tools = tmp_path / "tools"
    tools.mkdir()
    asked = tmp_path / "asked"
    npm = tools / "npm"
    npm.write_text(f'#!/bin/sh\necho "$@" >> "{asked}"\ncp "{archive}" onnxruntime-web.tgz\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/bin:/usr/bin")
    assert cached_runtime() is None
    lines = []
    first = runtime_folder(say=lines.append)
    assert runtime_folder(say=lines.append) == first == cached_runtime()
    assert len(lines) == 1
    (call,) = asked.read_text().splitlines()
    assert call.startswith("pack ")
    assert call.endswith(" onnxruntime-web@1.30.0")
    assert sorted(path.name for path in first.iterdir()) == sorted(RUNTIME_FILES)
    assert [path.name for path in first.parent.iterdir()] == [first.name]  # nothing half done is left


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            "#!/bin/sh\necho 'npm error network' >&2\nexit 1\n",
            r"npm does not give .* \(npm error network\)",
        ),
        (None, "there is no npm to fetch it: install Node.js, or say --runtime FOLDER"),
    ],
)
def test_without_npm_the_way_out_is_said(tmp_path, monkeypatch, script, said):
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    tools = tmp_path / "tools"
    tools.mkdir()
    if script:
        (tools / "npm").write_text(script)
        (tools / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(OSError, match=said):
        runtime_folder()
    assert not any((tmp_path / "cache").rglob("*.tgz"))


@pytest.fixture
def served(tmp_path):
    folder = tmp_path / "served"
    (folder / "ort").mkdir(parents=True)
    for name in ("index.html", "page.js", "ort/a.mjs", "ort/a.wasm", "m.onnx"):
        (folder / name).write_text(name)
    (tmp_path / "secret").write_text("secret")
    with PageServer(folder, port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server, path):
    connection = http.client.HTTPConnection(*server.server_address, timeout=10)
    connection.request("GET", path)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, content


def test_the_server_says_what_browsers_want(served):
    assert served.server_address[0] == "127.0.0.1"
    kinds = {
        "/": "text/html; charset=utf-8",
        "/page.js": "text/javascript; charset=utf-8",
        "/ort/a.mjs": "text/javascript; charset=utf-8",
        "/ort/a.wasm": "application/wasm",
        "/m.onnx": "application/octet-stream",
    }
    for path, kind in kinds.items():
        answer, content = get(served, path)
        assert (answer.status, answer.headers["Content-Type"]) == (200, kind)
        assert content.decode() == (path[1:] or "index.html")
        assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("path", ["/ort/", "/none", "/../secret", "/%2e%2e/secret", "/ort/../../secret"])
def test_the_server_gives_files_of_the_site_alone(served, path):
    answer, content = get(served, path)
    assert answer.status == 404
    assert b"a.wasm" not in content
    assert content != b"secret"


def test_a_port_that_is_taken_is_no_fault(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with PageServer(tmp_path, port=port) as server:
            assert server.server_address[1] not in (0, port)
            assert server.address == f"http://127.0.0.1:{server.server_address[1]}/"


def test_the_command_writes_and_serves(tmp_path, runtime, model, monkeypatch, capsys):
    model.write_bytes(b"no property in it")

    def interrupted(self):
        answer = threading.Thread(target=self.handle_request)
        answer.start()
        assert get(self, "/site.json")[0].status == 200
        answer.join()
        raise KeyboardInterrupt

    monkeypatch.setattr(PageServer, "serve_forever", interrupted)
    out = tmp_path / "site"
    arguments = ["web", str(model), "-o", str(out), "--runtime", str(runtime), "--example", str(sample_images()[0])]
    monkeypatch.setattr(sys, "argv", ["detpost", *arguments, "--serve"])
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code
    said = capsys.readouterr().out
    assert f"{model} was not written by detpost" in said
    assert f"{out / 'index.html'}: 0 MiB in all" in said
    assert re.search(r"http://127\.0\.0\.1:\d+/ \(stop with Ctrl-C\)", said)
    assert Path(out, "examples", "garden.png").is_file()


def test_the_front_page_of_the_docs_tries_it_where_the_runtime_is_there(tmp_path, runtime, monkeypatch):
    pytest.importorskip("mkdocs")
    from scripts import docs_page

    front = (Path(docs_page.__file__).parents[1] / "docs" / "index.md").read_text()
    assert front.count("assets/demo.png") == 1
    tried = docs_page.embedded(front)
    assert "assets/demo.png" not in tried
    assert 'src="try/index.html"' in tried
    assert tried.endswith(front[-500:])
    with pytest.raises(ValueError, match="must have the picture"):
        docs_page.embedded(tried)
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    monkeypatch.setattr(docs_page, "INSTALLED", tmp_path / "nothing")
    assert docs_page.runtime() is None
    monkeypatch.setattr(docs_page, "INSTALLED", runtime.parent)
    assert docs_page.runtime() == runtime
