"""The page in a real browser: what a user does with it, and that nothing leaves it."""

import functools
import http.server
import json
import re
import threading
import time

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from detpost import DetectionPostProcessor, Detector
from detpost.export import to_onnx
from detpost.images import FixedSize, _resizes_bytes
from detpost.web import write_site
from detpost.zoo import sample_images
from scripts.browser import RUNTIME, serving

pytestmark = pytest.mark.slow

DONE = "!document.querySelector('#status').dataset.busy"
ABOUT = "() => [crossOriginIsolated, document.querySelector('#about').textContent.split(' · ').at(-1)]"
FOUND = f"{DONE} && document.querySelector('#list li')"


def told(browser):
    """Give what the page says: its state, and what went wrong."""
    return browser.run(
        """() => [document.querySelector("#status").textContent,
                 [...document.querySelectorAll("#problems li")].map((line) => line.textContent)]"""
    )


def names(browser):
    return browser.run("() => [...document.querySelectorAll('#list .name')].map((name) => name.textContent)")


def choose(browser, *paths, until=None):
    browser.choose_files("#files", paths)
    browser.wait(until or f"{DONE} && document.querySelector('#status').textContent.startsWith('{paths[-1].name}')")


@pytest.fixture
def page(browser, site):
    """Give a browser that has the page open, with the first example found."""
    browser.open(site)
    browser.wait(FOUND)
    yield browser
    assert browser.errors == []
    assert [each for each in browser.requests if not each.removeprefix("blob:").startswith(site)] == []


def saved(browser):
    """Press the button that saves, and give the file."""
    path = browser.downloads / "detections.json"
    path.unlink(missing_ok=True)
    browser.run("() => document.querySelector('#save').click()")
    for _ in range(200):
        if path.exists() and path.stat().st_size:
            return json.loads(path.read_text())
        time.sleep(0.05)
    raise TimeoutError("no detections.json")


def test_the_samples_give_eager_pytorchs_detections(page):
    others = sample_images()[1:]
    choose(page, *others)
    coco = saved(page)
    assert [image["file_name"] for image in coco["images"]] == [path.name for path in sample_images()]
    assert [category["name"] for category in coco["categories"]] == [str(digit) for digit in range(10)]
    for image, path in zip(coco["images"], sample_images(), strict=True):
        expected = Detector.load("tiny", device="cpu", threshold=0.5).predict(path)[0]
        rows = [row for row in coco["annotations"] if row["image_id"] == image["id"]]
        assert (image["height"], image["width"]) == Image.open(path).size[::-1]
        assert [row["category_id"] for row in rows] == expected["labels"].tolist()  # in this order
        assert [row["score"] for row in rows] == pytest.approx(expected["scores"].tolist(), abs=1e-4)
        corners = [[x, y, x + width, y + height] for x, y, width, height in (row["bbox"] for row in rows)]
        assert np.array(corners) == pytest.approx(expected["boxes"].numpy(), abs=0.05)


@pytest.mark.skipif(not _resizes_bytes(), reason="torchvision resizes floats on this processor")
def test_images_that_it_has_not_seen_become_pythons_pixels_and_queries(page, tiny, tmp_path):
    photograph = Image.open(sample_images()[1]).convert("RGB").resize((901, 677), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[274] = 6
    photograph.save(tmp_path / "plain.jpg", quality=88)
    photograph.save(tmp_path / "turned.jpg", quality=95, exif=turned)
    photograph.convert("L").save(tmp_path / "grey.png")
    photograph.quantize(64).save(tmp_path / "palette.png")
    photograph.save(tmp_path / "lossless.webp", lossless=True)
    paths = sorted(tmp_path.glob("*.*"))
    detector = Detector.load("tiny", device="cpu")
    assert isinstance(detector.prepare, FixedSize)
    page.run("() => void (globalThis.picked = document.querySelector('#files').cloneNode())")
    page.run("() => { picked.id = 'picked'; document.body.append(picked); }")
    page.choose_files("#picked", paths)
    for place, path in enumerate(paths):
        image, sizes, _ = detector.prepare.batch([detector.ready(path)])
        with torch.no_grad():
            found = detector.run(image, sizes, None)
        kept = found.valid[0] & (found.scores[0] > 0.3)
        seen = page.run(
            """async (place) => {
              const [{ decodeImage, load }, { openImage }, { resize }] = await Promise.all(
                ["index", "images", "resize"].map((name) => import(`./src/${name}.js`)));
              const runtime = async () => {
                const ort = await import("./ort/ort.wasm.min.mjs");
                ort.env.wasm.wasmPaths = new URL("ort/", location.href).href;
                return ort;
              };
              globalThis.unseen ??= await load("tiny.onnx", { runtime, backend: "wasm" });
              const file = picked.files[place];
              const opened = await openImage(file);
              const { detections } = await unseen.detect(file);
              const above = detections.filter(({ score }) => score > 0.3);
              return {
                size: [opened.height, opened.width],
                pixels: [...resize(opened, 128, 128)],
                found: above.map(({ label, query }) => [label, query]),
              };
            }""",
            place,
        )
        assert seen["size"] == sizes[0].tolist(), path.name
        differing = np.array(seen["pixels"]) != (image * 255).round().numpy().ravel()
        assert differing.sum() == 0, path.name
        expected = torch.stack((found.labels[0][kept], found.queries[0][kept]), dim=1).tolist()
        assert seen["found"] == expected, path.name
        assert expected, path.name


def test_the_threshold_is_moved_without_running_the_network(page):
    page.run(
        """() => {
          const post = Worker.prototype.postMessage;
          globalThis.posted = 0;
          Worker.prototype.postMessage = function (...given) { posted += 1; return post.apply(this, given); };
        }"""
    )
    before, kept = names(page), saved(page)["annotations"]
    page.run("() => document.querySelector('#threshold').focus()")
    page.press("ArrowRight", 41)
    assert page.run("() => document.querySelector('#least').textContent") == "0.91"
    assert 0 < len(names(page)) < len(before)
    assert len(saved(page)["annotations"]) == len(names(page)) < len(kept)
    page.press("ArrowLeft", 90)
    assert len(names(page)) > len(before)
    assert page.run("() => posted") == 0
    choose(page, sample_images()[2])
    assert page.run("() => posted") > 0  # so it can be seen


def test_what_cannot_be_used_is_one_line_and_the_page_goes_on(page, tiny, tmp_path):
    (tmp_path / "notes.png").write_text("not an image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.new("1", (10000, 10000)).save(tmp_path / "huge.png")
    (tmp_path / "cut.png").write_bytes(sample_images()[0].read_bytes()[:200])
    plain = onnx.load(tiny)
    del plain.metadata_props[:]
    onnx.save_model(plain, tmp_path / "plain.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    to_onnx(DetectionPostProcessor.from_preset("rtdetr"), tmp_path / "post.onnx", num_queries=9, num_classes=3)
    before = told(page)
    assert before[1] == []
    for name, reason in {
        "notes.png": "not an image that this browser reads",
        "empty.jpg": "the file is empty",
        "huge.png": "10000 x 10000 pixels are more than 67108864",
        "cut.png": "not an image that this browser reads",
        "plain.onnx": "not written by detpost, so it does not say how it is read: run `detpost attach FILE -o OUT`",
        "text.onnx": "not an ONNX file, or not all of one",
    }.items():
        choose(page, tmp_path / name, until=f"{DONE} && document.querySelector('#problems li')")
        assert told(page) == [before[0], [f"{name}: {reason}"]]
        page.run("() => document.querySelector('#problems').replaceChildren()")
    choose(page, sample_images()[3])
    assert told(page)[1] == []
    assert names(page)
    # Another model takes the place of the first, for better or worse.
    choose(page, tmp_path / "post.onnx", until=f"{DONE} && document.querySelector('#problems li')")
    assert "post.onnx: takes a network's raw outputs and no images: export a whole detector" in told(page)[1]
    choose(page, tiny, until=f"{DONE} && document.querySelector('#model').textContent === 'tiny.onnx'")
    choose(page, sample_images()[3])
    assert names(page)


def test_a_page_of_a_model_without_metadata_says_so(browser, tiny, tmp_path):
    plain = onnx.load(tiny)
    del plain.metadata_props[:]
    onnx.save_model(plain, tmp_path / "plain.onnx")
    written = write_site(tmp_path / "plain.onnx", tmp_path / "site", runtime=RUNTIME, examples=sample_images()[:1])
    assert "was not written by detpost" in written.notes[0]
    with serving(written.folder) as address:
        browser.open(address)
        browser.wait(f"{DONE} && document.querySelector('#problems li')")
        status, (problem,) = told(browser)
        assert problem.startswith("plain.onnx: not written by detpost")
        assert status == "No detector."
        refused = "document.querySelector('#problems').textContent.includes('no detector')"
        choose(browser, sample_images()[0], until=refused)
        choose(browser, tiny, until=f"{DONE} && document.querySelector('#model').textContent === 'tiny.onnx'")
        choose(browser, sample_images()[0])
        assert names(browser)


def test_images_come_by_drop_and_paste_and_from_the_examples(page):
    dropped = """async (name, kind) => {
      const content = await (await fetch(`examples/${name}`)).blob();
      const carried = new DataTransfer();
      carried.items.add(new File([content], `${kind}.png`, { type: "image/png" }));
      document.dispatchEvent(kind === "drop"
        ? new DragEvent("drop", { dataTransfer: carried, bubbles: true, cancelable: true })
        : new ClipboardEvent("paste", { clipboardData: carried, bubbles: true }));
    }"""
    (first, second) = (path.name for path in sample_images()[:2])
    for kind in ("drop", "paste"):
        page.run(dropped, first, kind)
        page.wait(f"{DONE} && document.querySelector('#status').textContent.startsWith('{kind}.png')")
        assert len(names(page)) == 3
    page.run("() => document.querySelector('#example-list button').click()")
    page.wait(f"{DONE} && document.querySelector('#status').textContent.startsWith('{second}')")
    shown = "() => [...document.querySelectorAll('#images button')].map((button) => button.getAttribute('aria-label'))"
    assert page.run(shown) == [first, "drop.png", "paste.png", second]
    assert page.run("() => document.querySelector('#examples').hidden")  # none is left


def test_the_camera_runs_until_it_is_stopped(page):
    page.run("() => document.querySelector('#camera').click()")
    page.wait("document.querySelector('#status').textContent.startsWith('camera 1: ')")
    times = set()
    for _ in range(100):
        times.add(told(page)[0])
        if len(times) > 2:
            break
        time.sleep(0.05)
    assert len(times) > 2  # one frame after the other
    assert page.run("() => document.querySelector('#camera').getAttribute('aria-pressed')") == "true"
    page.run("() => document.querySelector('#camera').click()")
    page.wait("document.querySelector('#video').srcObject === null")
    assert page.run("() => document.querySelector('#camera').getAttribute('aria-pressed')") == "false"
    assert told(page)[1] == []
    choose(page, sample_images()[1])
    assert names(page)


def test_the_keyboard_reaches_everything(page):
    choose(page, sample_images()[1])
    reached = []
    for _ in range(30):
        page.press("Tab")
        reached.append(
            page.run("() => document.activeElement.id || document.activeElement.getAttribute('aria-label') || 'body'")
        )
        if reached[-1] == "save":
            break
    images = [path.name for path in sample_images()[:2]]
    assert reached[: 2 + len(images)] == ["choose", "camera", *images]
    listed = [each for each in reached if ", score 0." in each]
    assert reached[-len(listed) - 2 :] == ["threshold", *listed, "save"]
    assert len(listed) == len(names(page)) > 2
    # A small picture keeps the focus when it is pressed; a row that has it marks its box.
    page.run(f"() => document.querySelector('#images [aria-label=\"{images[0]}\"]').focus()")
    page.press("Enter")
    page.wait(f"document.querySelector('#status').textContent.startsWith('{images[0]}')")
    assert page.run("() => document.activeElement.getAttribute('aria-label')") == images[0]
    drawn = "() => document.querySelector('#canvas').toDataURL()"
    before = page.run(drawn)
    page.run("() => document.querySelector('#list button').focus()")
    assert page.run(drawn) != before
    page.run("() => document.querySelector('#list button').blur()")
    assert page.run(drawn) == before


def test_a_screen_reader_is_told_all(page):
    page.send("Accessibility.enable")
    tree = page.send("Accessibility.getFullAXTree")["nodes"]

    def texts(role):
        found = [node for node in tree if node.get("role", {}).get("value") == role and not node["ignored"]]
        return [node.get("name", {}).get("value", "") for node in found]

    assert texts("heading")[0] == "tiny.onnx"
    assert texts("slider") == ["Score above"]
    assert all(texts("button"))
    assert {"Choose images", "Camera", "Save as COCO JSON"} <= set(texts("button"))
    (picture,) = [name for name in texts("image") if "boxes" in name]
    assert re.fullmatch(r"garden.png with 3 boxes: (\d \d\.\d\d(, )?){3}", picture)
    live = page.run("() => ['status', 'problems'].map((id) => document.getElementById(id).getAttribute('role'))")
    assert live == ["status", "alert"]
    assert page.run("() => document.documentElement.lang") == "en"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_phones_and_desks_by_day_and_night(page, scheme):
    for width in (320, 390, 768, 1400):
        page.look(width, 800, scheme)
        page.run("() => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)))")
        wide, canvas, room = page.run(
            """() => [document.documentElement.scrollWidth, document.querySelector('#canvas').clientWidth,
                      document.querySelector('#drop').clientWidth]"""
        )
        assert wide <= width
        assert 0.4 * room < canvas <= room
    # Text on its ground, by WCAG's contrast for text of any size.
    assert page.run(
        """() => {
          const light = (colour) => {
            const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map((value) => value / 255)
              .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const ground = light(getComputedStyle(document.body).backgroundColor);
          const ratios = ["#status", "#about", "footer p"].map((each) => {
            const text = light(getComputedStyle(document.querySelector(each)).color);
            const [high, low] = [ground, text].sort((a, b) => b - a);
            return (high + 0.05) / (low + 0.05);
          });
          return [Math.min(...ratios) >= 4.5, ground > 0.5 ? "light" : "dark"];
        }"""
    ) == [True, scheme]


def test_it_works_offline_once_it_is_open(page):
    page.send("Network.enable")
    page.send("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
    try:
        choose(page, sample_images()[2])
        assert len(names(page)) == 4
    finally:
        page.send(
            "Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1
        )


def test_the_policy_lets_nothing_else_in_or_out(site, browser):
    browser.open(site)
    browser.wait(FOUND)
    refused = browser.run(
        """async () => {
          const script = document.createElement("script");
          script.textContent = "globalThis.ran = true";
          document.body.append(script);
          const other = await fetch("http://127.0.0.1:9/").then(() => "fetched", () => "refused");
          const made = (() => { try { return eval("1"); } catch { return "refused"; } })();
          return [globalThis.ran ?? "refused", other, made];
        }"""
    )
    assert refused == ["refused"] * 3
    assert sum("Content Security Policy" in error for error in browser.errors) >= 2
    assert [each for each in browser.requests if ":9/" in each] == []


def test_a_plain_server_is_enough(site, browser, tiny, tmp_path):
    # Without the headers that isolate the page: no threads, and the same detections.
    folder = write_site(tiny, tmp_path / "site", runtime=RUNTIME, examples=sample_images()[:1]).folder

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            browser.open(f"http://127.0.0.1:{server.server_address[1]}/")
            browser.wait(FOUND)
            assert len(names(browser)) == 3
            about = browser.run(ABOUT)
            assert about == [False, "WebAssembly"]
            browser.open(site)
            browser.wait(FOUND)
            about = browser.run(ABOUT)
            assert about == [True, "WebAssembly, threads"]
        finally:
            server.shutdown()
            thread.join()


def test_a_page_from_the_disk_says_what_to_do(browser, tiny, tmp_path):
    folder = write_site(tiny, tmp_path / "site", runtime=RUNTIME).folder
    browser.open((folder / "index.html").as_uri())
    assert "detpost web MODEL.onnx -o SITE --serve" in told(browser)[0]
