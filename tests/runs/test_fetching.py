"""Images at web addresses: fetched once, whole or not at all, and to no other place."""

import functools
import http.server
import shutil
import threading

import pytest

from detpost.runs.detect import detect
from detpost.runs.fetching import fetched
from detpost.zoo import sample_images


@pytest.fixture
def server(tmp_path):
    """A web server with an image, and the paths that it was asked for."""
    folder, asked = tmp_path / "served", []
    folder.mkdir()
    shutil.copy(sample_images()[0], folder / "a b.png")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, *_):
            asked.append(self.path)

        def do_GET(self):
            if not self.path.startswith("/cut"):
                return super().do_GET()
            self.log_request()
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x")

        def log_error(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}", asked
        served.shutdown()


def test_an_image_is_fetched_once_and_detected_in(server, tmp_path):
    address, asked = server
    out = tmp_path / "out"
    for _ in range(2):
        found = detect([f"{address}/a%20b.png"], out, device="cpu")
    assert (found.images, found.resumed) == (1, 1)
    assert found.detections > 0
    assert asked == ["/a%20b.png"]
    (file,) = (out / "fetched").rglob("*.png")
    assert file.name == "a b.png"
    assert file.read_bytes() == sample_images()[0].read_bytes()


def test_what_is_no_address_stays(tmp_path):
    assert fetched(["photos", tmp_path, "*.png"], tmp_path) == ["photos", tmp_path, "*.png"]


@pytest.mark.parametrize(
    "path", ["/../../a%20b.png", "/%2e%2e/%2e%2e/a%20b.png", "//a%20b.png", "/a%20b.png?../../x", "/a%20b.png?x=/../y"]
)
def test_no_address_leads_out_of_the_folder(server, tmp_path, path):
    address, _ = server
    (file,) = fetched([address + path], tmp_path / "out")
    assert file.resolve().parent.parent == tmp_path / "out" / "fetched"
    assert file.read_bytes() == sample_images()[0].read_bytes()


@pytest.mark.parametrize(
    ("path", "why"),
    [("/none.png", "File not found"), ("/cut.png", "999 bytes too early"), ("/a b.png", "control characters|URL")],
)
def test_what_cannot_be_fetched_is_one_line_and_leaves_nothing(server, tmp_path, path, why):
    address, _ = server
    with pytest.raises(OSError, match=f"cannot fetch {address}{path}: .*({why})") as error:
        fetched([address + path], tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [file for file in (tmp_path / "out").rglob("*") if file.is_file()] == []


def test_other_schemes_are_rays(tmp_path):
    with pytest.raises(ValueError, match="s3://bucket/photos is an address of s3: --engine ray reads folders there"):
        fetched(["s3://bucket/photos"], tmp_path)


def test_a_password_is_neither_taken_nor_said(tmp_path):
    with pytest.raises(ValueError, match="the address of host has a name or password in it") as error:
        fetched(["https://name:secret@host/x.png"], tmp_path)
    assert "secret" not in str(error.value)
