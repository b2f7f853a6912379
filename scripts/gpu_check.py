"""Everything that needs a GPU, in one call of at most eight minutes: the gpu tests, the same-answer matrix, the times.

    python scripts/gpu_check.py --out gpu.json
    python scripts/gpu_check.py --device cpu --quick      # the same way through, without a GPU

Writes one JSON file, also when a part fails or runs out of time: what was found by then stays in it. Exit status 1 if a
test failed, a slot differed or a part did not finish.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

BUDGET_S = {"tests": 200, "matrix": 120, "bench": 140}


def machine(device: str) -> dict[str, object]:
    """Say where this ran."""
    import importlib.metadata as metadata

    versions = {}
    for name in ("torch", "triton", "numpy", "transformers", "kornia", "monai", "onnxruntime", "openvino"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"device": device, "gpu": gpu, "python": platform.python_version(), "cuda": torch.version.cuda} | versions


def run_part(arguments: list[str], seconds: float) -> tuple[int | None, str]:
    """Run a part in a process of its own, so that a crash or a hang of one leaves the others alone."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        return None, said + f"\nstopped after {seconds:.0f} s"
    return done.returncode, done.stdout + done.stderr


def run_tests(device: str, quick: bool) -> dict[str, object]:
    """Run the tests that carry the marker ``gpu``; without a GPU, those of the native kernels."""
    where = ["-m", "gpu", "tests"] if device == "cuda" else ["tests/kernels/cpu/test_decode.py"]
    arguments = ["-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    status, said = run_part([*arguments, *where], BUDGET_S["tests"] / (2 if quick else 1))
    counts = {name: int(n) for n, name in re.findall(r"(\d+) (passed|failed|skipped|error|errors|deselected)", said)}
    failures = re.findall(r"^(?:FAILED|ERROR) .*$", said, flags=re.MULTILINE)
    return {"ok": status == 0, "counts": counts, "failures": failures, "tail": said[-1500:]}


def run_matrix(device: str, quick: bool) -> dict[str, object]:
    """Count the slots that agree with eager CPU in every runtime of this machine."""
    presets = {}
    for preset in ("rtdetr",) if quick else ("rtdetr", "detr"):
        with tempfile.TemporaryDirectory() as folder:
            table = Path(folder) / "matrix.json"
            _, said = run_part(
                ["scripts/same_answer.py", "--preset", preset, "--json", str(table)], BUDGET_S["matrix"] / 2
            )
            presets[preset] = json.loads(table.read_text()) if table.exists() else {"error": said[-1500:]}
    shares = [row["exact"] for rows in presets.values() for row in rows.values() if isinstance(row, dict)]
    return {"ok": bool(shares) and all(share == 1 for share in shares), "presets": presets}


def run_bench(device: str, quick: bool) -> dict[str, object]:
    """Time detpost beside the installed peers."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["-m", "benchmarks", "--device", device, "--out", folder, *(["--quick"] if quick else [])]
        _, said = run_part(arguments, BUDGET_S["bench"])
        table = Path(folder) / "bench.json"
        found = json.loads(table.read_text()) if table.exists() else {"error": said[-1500:]}
    return {"ok": "rows" in found, **found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes, one preset")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: run with --device cpu to see the way through", file=sys.stderr)
        return 2
    report: dict[str, object] = {"machine": machine(arguments.device)}
    ok = True
    for name, part in (("tests", run_tests), ("matrix", run_matrix), ("bench", run_bench)):
        start = time.perf_counter()
        found = part(arguments.device, arguments.quick)
        found["seconds"] = round(time.perf_counter() - start, 1)
        report[name] = found
        ok = ok and bool(found["ok"])
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{name}: {'ok' if found['ok'] else 'NOT ok'} ({found['seconds']} s)", flush=True)
    print(arguments.out)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
