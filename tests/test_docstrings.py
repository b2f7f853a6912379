"""What the documentation says is whole and runs: docstrings, the pages of docs/, the README."""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import inspect
import json
import re
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

import detpost
from detpost.integrations import conventions

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

# Every module whose names a user may call.
MODULES = [
    "detpost", "detpost.boxes", "detpost.spec", "detpost.selection", "detpost.postprocess", "detpost.detections",
    "detpost.detector", "detpost.losses", "detpost.metrics", "detpost.export", "detpost.purity", "detpost.heads",
    "detpost.nms", "detpost.fusion", "detpost.integrations.transformers", "detpost.integrations.kornia",
    "detpost.integrations.rtdetr", "detpost.integrations.rfdetr", "detpost.integrations.ultralytics",
    "detpost.runs.detect", "detpost.runs.evaluate", "detpost.images", "detpost.runs.drawing", "detpost.zoo",
]  # fmt: skip

# The names of the contract, each of which shows how it is used.
WITH_EXAMPLE = [
    "DecodeSpec", "DecodeSpec.preset", "DecodeSpec.from_config", "presets", "DetectionPostProcessor",
    "DetectionPostProcessor.from_preset", "Detections", "Detections.to_list", "Detections.to_coco",
    "Detections.to_supervision", "Detections.to_kornia", "select_top_k", "boxes.convert", "boxes.scale", "boxes.clip",
    "boxes.hflip", "boxes.vflip", "boxes.transform", "boxes.unletterbox", "losses.HausdorffERLoss",
    "losses.HausdorffERLoss3D", "losses.HausdorffDTLoss", "losses.LogHausdorffDTLoss", "losses.distance_transform_edt",
    "losses.BoundaryLoss", "losses.GeneralizedSurfaceLoss", "losses.HausdorffSchedule",
    "losses.signed_distance_transform", "metrics.hausdorff_distance", "metrics.average_surface_distance",
    "metrics.surface_dice", "export.to_onnx", "export.attach", "export.compile", "export.package",
    "export.CudaGraph", "export.to_openvino", "export.verify", "purity.check", "purity.assert_pure",
    "purity.PurityReport", "nms.nms", "fusion.weighted_boxes", "fusion.merge", "Detector", "Detector.load",
    "Detector.predict",
]  # fmt: skip

# Pages whose examples stand on objects that a test of their own makes.
TESTED_ELSEWHERE = {
    "drop-ins.md": "tests/integrations/test_drop_ins_page.py",
    "heads.md": "tests/heads/test_pages.py",
    "nms.md": "tests/heads/test_pages.py",
}


class Subject(NamedTuple):
    name: str
    value: Any  # a function or a class


def public_names(module: Any) -> list[str]:
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return list(listed)
    own = (name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__)
    return [name for name in own if not name.startswith("_")]


def methods_of(kind: type, name: str) -> Iterator[Subject]:
    for key, value in vars(kind).items():
        function = getattr(value, "__func__", value)  # of a classmethod or staticmethod
        if key.startswith("_") and key != "__call__":
            continue
        if isinstance(value, property):
            yield Subject(f"{name}.{key}", value.fget)
        elif inspect.isfunction(function) and key != "extra_repr":  # a hook of nn.Module's, for its repr
            yield Subject(f"{name}.{key}", function)


def subjects() -> list[Subject]:
    found: dict[str, Subject] = {}
    for place in MODULES:
        module = importlib.import_module(place)
        for key in public_names(module):
            value = getattr(module, key)
            name = f"{place}.{key}"
            if inspect.isfunction(value):
                found[f"{value.__module__}.{value.__qualname__}"] = Subject(name, value)
            elif inspect.isclass(value):
                found[f"{value.__module__}.{value.__qualname__}"] = Subject(name, value)
                for method in methods_of(value, name):
                    found[f"{value.__module__}.{value.__qualname__}{method.name[len(name) :]}"] = method
    return list(found.values())


def sections(text: str) -> dict[str, str]:
    """Split a Google docstring at its headings."""
    parts = re.split(r"^(Args|Attributes|Returns|Yields|Raises|Examples?|Source):$", text, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def entries(section: str) -> set[str]:
    return set(re.findall(r"^ {4}\*{0,2}(\w+)(?: \([^)]*\))?:", section, flags=re.MULTILINE))


def parameters(subject: Subject) -> set[str]:
    if inspect.isclass(subject.value) and subject.value.__init__ in (object.__init__, torch.nn.Module.__init__):
        return set()
    return set(inspect.signature(subject.value).parameters) - {"self", "cls"}


def raised(value: Any) -> set[str]:
    """The exceptions that a function raises itself, without those that it catches or makes for another to raise."""
    if inspect.isclass(value):
        # A dataclass has no __init__ of its own: the one it gets raises nothing.
        makers = (vars(value).get(name) for name in ("__post_init__" if is_dataclass(value) else "__init__",))
        return set().union(*(raised(maker) for maker in makers if inspect.isfunction(maker)))
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(value)))
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            names.add(node.exc.func.id)
    return names - {"Exit"}


def returns(value: Any) -> str | None:
    """The section that says what comes out, where something does."""
    if inspect.isclass(value):
        return None
    annotation = str(inspect.signature(value).return_annotation)
    if annotation in ("None", "NoReturn", "<class 'inspect._empty'>"):
        return None
    return "Yields" if hasattr(value, "__wrapped__") and "Iterator" in annotation else "Returns"


def complaints(subject: Subject) -> list[str]:
    text = inspect.getdoc(subject.value) or ""
    found = sections(text)
    said: list[str] = []
    if not found[""].strip():
        return ["no summary"]
    missing = parameters(subject) - entries(found.get("Args", "") + found.get("Attributes", ""))
    said += [f"{name} is not under Args" for name in sorted(missing)]
    is_property = not inspect.isclass(subject.value) and parameters(subject) == set() and "." in subject.name
    wanted = returns(subject.value)
    if wanted and wanted not in found and not (is_property and isinstance(_attribute(subject.name), property)):
        said.append(f"no {wanted}")
    promised = entries(found.get("Raises", ""))
    said += [f"{name} is not under Raises" for name in sorted(raised(subject.value)) if not _names_of(name) & promised]
    return said


def _names_of(exception: str) -> set[str]:
    """An exception and what it is a kind of: who promises an OSError may raise a FileNotFoundError."""
    kind = getattr(builtins, exception, None) or getattr(conventions, exception, None)
    return {exception} if kind is None else {base.__name__ for base in kind.__mro__} - {"Exception", "BaseException"}


def _attribute(name: str) -> Any:
    """What stands at a dotted name, a property as itself."""
    parts = name.split(".")
    value: Any = detpost
    for part in parts[1:]:
        value = importlib.import_module(f"{value.__name__}.{part}") if _is_module(value, part) else _raw(value, part)
    return value


def _is_module(value: Any, part: str) -> bool:
    return inspect.ismodule(value) and f"{value.__name__}.{part}" in MODULES


def _raw(value: Any, part: str) -> Any:
    return inspect.getattr_static(value, part) if inspect.isclass(value) else getattr(value, part)


SUBJECTS = subjects()


@pytest.mark.parametrize("subject", SUBJECTS, ids=[subject.name for subject in SUBJECTS])
def test_a_docstring_says_what_comes_in_what_goes_out_and_what_is_raised(subject):
    assert complaints(subject) == []


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_a_name_of_the_contract_has_an_example(name):
    value = _attribute(f"detpost.{name}")
    found = sections(inspect.getdoc(value) or "")
    assert ">>> " in found.get("Example", found.get("Examples", ""))


@pytest.mark.parametrize("name", MODULES)
def test_a_public_module_says_what_it_is_for(name):
    assert (importlib.import_module(name).__doc__ or "").strip()


def test_the_docstring_check_can_fail():
    def short(count: int, other: int) -> int:
        """Say little.

        Args:
            count: of something.
        """
        if count:
            raise ValueError("no")
        return other

    assert complaints(Subject("short", short)) == [
        "other is not under Args",
        "no Returns",
        "ValueError is not under Raises",
    ]


# --- the examples of the pages ---


class Example(NamedTuple):
    code: str
    line: int
    skipped: str  # the reason, from a comment in front of it


def examples(text: str) -> list[Example]:
    pattern = re.compile(
        r"(?:^<!-- skip: (?P<reason>.+?) -->\n)?^```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
    )
    return [
        Example(match["code"], text[: match.start("code")].count("\n"), match["reason"] or "")
        for match in pattern.finditer(text)
    ]


PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", *DOCS.glob("*.md")]
    if path.name not in TESTED_ELSEWHERE and examples(path.read_text(encoding="utf-8"))
)


class TinyOutputs(torch.nn.Module):
    """Stands for a transformers detector: a config, and outputs with logits and boxes."""

    config = SimpleNamespace(model_type="rt_detr_v2", num_queries=9)

    def forward(self, pixel_values):
        return SimpleNamespace(
            logits=torch.randn(len(pixel_values), 9, 2), pred_boxes=torch.rand(len(pixel_values), 9, 4)
        )


def given(page: str) -> dict[str, Any]:
    """What the examples take as already there."""
    sizes = torch.tensor([[480, 640], [720, 1280]])
    names: dict[str, Any] = {
        "torch": torch,
        "model": TinyOutputs(),
        "pixel_values": torch.rand(2, 3, 64, 64),
        "logits": torch.randn(2, 9, 2),
        "boxes": torch.rand(2, 9, 4),
        "image_sizes": sizes,
        "orig_target_sizes": sizes.flip(-1),
        "class_names": ["cat", "dog"],
        "array": torch.zeros(64, 64, 3, dtype=torch.uint8).numpy(),
        "tensor": torch.rand(3, 64, 64),
        "MyModule": torch.nn.Sigmoid,
    }
    if page == "README.md":  # there logits are those of a segmentation
        names |= {
            "logits": torch.randn(2, 3, 16, 16),
            "prediction": torch.randn(2, 3, 16, 16).softmax(dim=1),
            "target": torch.randint(3, (2, 1, 16, 16)),
            "masks": torch.randint(2, (2, 3, 16, 16)).float(),
        }
    return names


def prepare(folder: Path) -> None:
    """Files that the examples name: photographs, COCO files, and an ONNX detector of someone else's."""
    from onnx import TensorProto, helper, save

    from detpost.zoo import SAMPLES, sample_images

    for name in ("photos", "val"):
        (folder / name).mkdir()
        for image in sample_images():
            shutil.copy(image, folder / name)
    shutil.copy(sample_images()[0], folder / "photo.jpg")  # Pillow looks at what is in it
    truth = json.loads((SAMPLES / "ground_truth.json").read_text())
    (folder / "instances.json").write_text(json.dumps(truth))
    rows = [
        {key: row[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for row in truth["annotations"]
    ]
    (folder / "detections.json").write_text(json.dumps(rows))
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 9, n]) for name, n in (("a", 2), ("b", 4))]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 9, n])
        for name, n in (("logits", 2), ("boxes", 4))
    ]
    nodes = [helper.make_node("Identity", ["a"], ["logits"]), helper.make_node("Identity", ["b"], ["boxes"])]
    opset = [helper.make_opsetid("", 17)]
    graph = helper.make_graph(nodes, "theirs", inputs, outputs)
    save(helper.make_model(graph, opset_imports=opset, ir_version=8), folder / "someone-elses.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = given(page)
    for example in examples((ROOT / page).read_text(encoding="utf-8")):
        if not example.skipped:
            exec(compile("\n" * example.line + example.code, page, "exec"), names)


def test_a_page_that_is_tested_elsewhere_is():
    for page, test in TESTED_ELSEWHERE.items():
        assert examples((DOCS / page).read_text(encoding="utf-8"))
        assert page.removesuffix(".md") in (ROOT / test).read_text(encoding="utf-8")


def test_an_example_is_found_with_its_line_and_its_reason():
    found = examples(
        "text\n\n```python\na = 1\n```\n\n<!-- skip: no time -->\n```python\nb = 2\n```\n```bash\nls\n```\n"
    )
    assert found == [Example("a = 1\n", 3, ""), Example("b = 2\n", 8, "no time")]


# --- the site ---


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    plain = (re.sub(r"[`*\[\]]|\]\([^)]*\)", "", heading) for heading in headings)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in plain}


def links(path: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)) if "://" not in link]


WRITTEN = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])


@pytest.mark.parametrize("path", WRITTEN, ids=[path.relative_to(ROOT).as_posix() for path in WRITTEN])
def test_every_link_leads_somewhere(path):
    for link in links(path):
        file, _, anchor = link.partition("#")
        goal = (path.parent / file).resolve() if file else path
        assert goal.exists(), link
        if anchor:
            assert anchor in anchors(goal.read_text(encoding="utf-8")), link


def test_the_navigation_holds_every_page():
    named = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert named == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


def referenced() -> set[str]:
    """The names that the reference pages show; a whole module stands for the members it lists, or for all."""
    found: set[str] = set()
    for path in (DOCS / "reference").glob("*.md"):
        text = path.read_text(encoding="utf-8")
        for name, options in re.findall(r"^::: (\S+)\n((?:    .*\n)*)", text, flags=re.MULTILINE):
            if name not in MODULES:
                place, _, last = name.rpartition(".")
                # A function of its module's name goes by the package's: detpost.export.attach.
                found.add(place if place.endswith(f".{last}") and place not in MODULES else name)
                continue
            listed = re.search(r"members: \[(.*)\]", options)
            names = listed[1].split(", ") if listed else public_names(importlib.import_module(name))
            found.update(f"{name}.{member}" for member in names)
    return found


def test_the_reference_has_every_public_name_and_no_other():
    shown = referenced()
    for name in shown:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute) or importlib.util.find_spec(name), name
    for place in ("boxes", "export", "losses", "metrics", "heads", "nms", "fusion", "purity"):
        module = importlib.import_module(f"detpost.{place}")
        wanted = {name for name in public_names(module) if callable(getattr(module, name))}
        assert {f"detpost.{place}.{name}" for name in wanted} <= shown | {"detpost.boxes.BoxFormat"}
    top = {name for name in detpost.__all__ if not inspect.ismodule(getattr(detpost, name))}
    assert {f"detpost.{name}" for name in top} <= shown
    for library in ("transformers", "kornia", "rtdetr", "rfdetr", "ultralytics"):
        module = importlib.import_module(f"detpost.integrations.{library}")
        wanted = {name for name in module.__all__ if callable(getattr(module, name))}
        assert {f"detpost.integrations.{library}.{name}" for name in wanted} <= shown


def test_the_page_on_the_command_has_every_command():
    from detpost.command.cli import app

    text = (DOCS / "reference" / "command.md").read_text(encoding="utf-8")
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert set(re.findall(r"^\| `detpost (\w+)", text, flags=re.MULTILINE)) == commands


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_no_other_site(tmp_path, monkeypatch):
    pytest.importorskip("mkdocstrings")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.chdir(ROOT)
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path / "site")))
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= len(list(DOCS.rglob("*.md")))
    for page in pages:
        # Links may lead out; what a browser loads by itself may not.
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*src=\"?([^\s\">]+)", page.read_text(encoding="utf-8"))
        loaded += re.findall(
            r"<link[^>]*rel=\"?stylesheet\"?[^>]*href=\"?([^\s\">]+)", page.read_text(encoding="utf-8")
        )
        assert [address for address in loaded if "//" in address] == []


def test_a_notebook_becomes_a_page():
    pytest.importorskip("mkdocs")
    render = importlib.import_module("scripts.docs_notebooks").render
    outputs = [
        {"output_type": "stream", "text": ["\x1b[1mbold\x1b[0m\n"]},
        {"output_type": "display_data", "data": {"image/png": "aGk=", "text/plain": "<Figure>"}},
    ]
    cells = [
        {
            "cell_type": "markdown",
            "source": ["# Title\n", "[a](02.ipynb) [b](../docs/nms.md#how) [c](../detpost/nms.py)"],
        },
        {"cell_type": "code", "source": "print(1)", "outputs": outputs},
    ]
    text, pictures = render({"cells": cells}, "01_title")
    assert text.startswith("# Title\n[a](02.md) [b](../nms.md#how) c\n")
    assert "```python\nprint(1)\n```\n\n```text\nbold\n```\n\n![output](01_title-0.png)" in text
    assert pictures == {"01_title-0.png": b"hi"}
