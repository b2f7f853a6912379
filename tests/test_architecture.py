"""Imports go one way: the floors of detpost, read from the imports themselves."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import detpost

PACKAGE = Path(detpost.__file__).parent
# From the bottom up; a module imports from its own floor and from those below it.
FLOORS = (
    ("tensors", "boxes", "spec", "detections", "images", "image_files", "zoo"),
    ("reference",),
    ("kernels",),
    ("selection", "postprocess", "nms", "fusion", "heads"),
    ("losses", "metrics"),
    ("integrations",),
    ("export",),
    ("detector",),
    ("verify",),
    ("runs", "web"),
    ("purity",),
    ("command",),
)
# Tables of plain data, which import nothing of the package: on the ground, wherever they are filed.
GROUND = ("detpost.export.formats", "detpost.export.targets")
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Run by name, and not imported.
FREE = ("detpost", "detpost.__main__")
# A public name that a lower floor gives away when it is asked for.
GIVEN_AWAY = {("detpost.export", "detpost.verify")}
# What asks whether a graph is being written, and what is above the definition.
NOT_IN_REFERENCE = {
    *("is_in_onnx_export", "is_exporting", "_is_exporting_flag", "is_tracing", "_is_tracing", "writes_graph"),
    *("kernels", "onnx", "export", "native", "triton", "DETPOST_KERNEL"),
}


def modules_of(package: Path) -> dict[str, Path]:
    """Name every module of a package."""
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def public_names(package: Path) -> dict[str, str]:
    """Say where a name that the package gives away at its front door is from."""
    tree = ast.parse((package / "__init__.py").read_text())
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def imports_of(package: Path) -> dict[str, set[str]]:
    """Say which modules of the package each of them imports, on top and inside functions."""
    modules, front = modules_of(package), public_names(package)

    def module(name: str) -> str | None:
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name or None

    found = {}
    for name, path in modules.items():
        near = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        asked = []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                asked += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                of = node.module or ""
                if node.level:
                    of = ".".join([*near[: len(near) - node.level + 1], *([of] if of else [])])
                for alias in node.names:
                    whole = f"{of}.{alias.name}"
                    asked.append(front.get(alias.name, whole) if of == package.name and whole not in modules else whole)
        found[name] = {target for target in map(module, asked) if target} - {name}
    return found


def floor_of(module: str) -> int:
    """Give the floor of a module."""
    return 0 if module in GROUND else FLOOR_OF[module.split(".")[1]]


def faults(package: Path) -> list[str]:
    """Say what goes up, and what goes round in a circle."""
    imports = imports_of(package)
    free = tuple(name.replace("detpost", package.name, 1) for name in FREE)
    found = []
    for name, targets in sorted(imports.items()):
        if name in free:
            continue
        for target in sorted(targets - set(free)):
            if floor_of(target) > floor_of(name) and (name, target) not in GIVEN_AWAY:
                found.append(f"{name} imports {target}, which is above it")
    # Circles on one floor: one over several has a step upwards, which is said above.
    within = {
        name: {target for target in targets - set(free) if floor_of(target) == floor_of(name)}
        for name, targets in imports.items()
        if name not in free
    }
    # A package is no part of its own modules: importing one of them runs it, whoever does.
    edges = {
        name: {target for target in targets if not name.startswith(f"{target}.")} for name, targets in within.items()
    }
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        found.append(f"a circle: {' <- '.join(error.args[1])}")
    return found


def test_every_module_has_a_floor():
    rooms = {name.split(".")[1] for name in modules_of(PACKAGE) if name not in FREE}
    assert rooms == set(FLOOR_OF)


def test_no_import_goes_up_or_round():
    assert faults(PACKAGE) == []


@pytest.mark.parametrize(
    ("path", "planted", "said"),
    [
        ("spec.py", "from detpost import postprocess", "detpost.spec imports detpost.postprocess, which is above it"),
        ("boxes.py", "from . import nms", "detpost.boxes imports detpost.nms, which is above it"),
        (
            "reference/decode.py",
            "def late():\n    from detpost.kernels import select",
            "detpost.reference.decode imports detpost.kernels, which is above it",
        ),
        (
            "losses/loss.py",
            "from detpost import Detector",
            "detpost.losses.loss imports detpost.detector, which is above it",
        ),
        ("reference/selection.py", "import detpost.reference.decode", "a circle"),
    ],
)
def test_what_is_planted_is_found(tmp_path, path, planted, said):
    package = tmp_path / "detpost"
    contents = {
        "__init__.py": "from detpost.detector import Detector",
        "spec.py": "",
        "boxes.py": "from detpost.spec import DecodeSpec",
        "nms.py": "from detpost import kernels",
        "detector.py": "",
        "postprocess.py": "from detpost import kernels, boxes",
        "reference/__init__.py": "",
        "reference/selection.py": "",
        "reference/decode.py": "from detpost.reference.selection import select_top_k",
        "kernels/__init__.py": "from detpost.kernels.dispatch import select",
        "kernels/dispatch.py": "from detpost.reference import decode",
        "losses/__init__.py": "",
        "losses/loss.py": "from detpost.kernels import erosion",
    }
    for name, text in contents.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text + "\n")
    assert faults(package) == []
    (package / path).write_text(contents[path] + "\n" + planted + "\n")
    found = faults(package)
    assert len(found) == 1
    assert found[0].startswith(said)


def exporter_or_kernel_names(source: str) -> set[str]:
    """Give what in a module asks after an exporter, or reaches for a kernel."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.update(node.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            found.update((node.module or "").split("."))
        elif isinstance(node, ast.Constant) and node.value == "DETPOST_KERNEL":
            found.add(node.value)
    return found & NOT_IN_REFERENCE


def test_the_definition_has_no_branch_for_exporters_or_kernels():
    assert {path.name: exporter_or_kernel_names(path.read_text()) for path in (PACKAGE / "reference").glob("*.py")} == {
        path.name: set() for path in (PACKAGE / "reference").glob("*.py")
    }
    planted = "def decode(x):\n    return x if torch.onnx.is_in_onnx_export() else kernels.decode(x)"
    assert exporter_or_kernel_names(planted) == {"is_in_onnx_export", "kernels", "onnx"}
