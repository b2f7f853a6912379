"""The ``detpost`` command."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from detpost.spec import DecodeSpec, presets

app = typer.Typer(
    name="detpost",
    help="Exact, exportable post-processing for DETR-family detectors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

PRESET_HELP = f"How the outputs are decoded: {', '.join(presets())}."


@contextlib.contextmanager
def steps() -> Iterator[Callable[[str], None]]:
    """Show the step that is running; on a terminal as a spinner, elsewhere as lines."""
    if not console.is_terminal:
        yield lambda line: console.print(f"... {line}", highlight=False)
        return
    with console.status("starting") as status:
        yield lambda line: status.update(line)


@app.command()
def demo(
    images: Annotated[
        list[Path] | None, typer.Argument(help="Images; the shipped samples where none are given.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for pictures, detections.json and tiny.onnx.")] = Path("demo_out"),
) -> None:
    """Detect digits, draw them, export to ONNX, run that in ONNX Runtime, and show that both agree."""
    from detpost.demo import run_demo
    from detpost.zoo import sample_images

    with steps() as say:
        result = run_demo(out, images or sample_images(), say)
    for image in result.images:
        table = Table("digit", "score", "x1", "y1", "x2", "y2", title=image.name, title_justify="left")
        rows = zip(
            image.found["label_names"], image.found["scores"].tolist(), image.found["boxes"].tolist(), strict=True
        )
        for name, score, box in rows:
            table.add_row(name, f"{score:.3f}", *(f"{value:.1f}" for value in box))
        console.print(table)
    agreement = Table("image", "detections", "match", "box difference", "score difference", "decode of its raw outputs")
    agreement.title, agreement.title_justify = f"PyTorch against ONNX Runtime ({result.model.name})", "left"
    for image in result.images:
        match = image.match
        agreement.add_row(
            image.name,
            str(match.first),
            "yes" if match.ok else f"NO ({match.matched} of {match.first + match.second})",
            f"{match.box_difference:.2g} px",
            f"{match.score_difference:.2g}",
            "identical" if image.decode_identical else "DIFFERENT",
        )
    console.print(agreement)
    console.print(f"network exported with the {result.exporter} exporter; everything is in {out}/", highlight=False)
    if not result.ok:
        raise typer.Exit(1)


@app.command()
def check(
    targets: Annotated[list[str], typer.Argument(help="Files or folders to read, or package.module:Callable to run.")],
    shape: Annotated[list[str] | None, typer.Option(help="Shape of each input of a callable, as 2,300,80.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Dtype of each input, or one for all.")] = None,
    output_format: Annotated[str, typer.Option("--format", help="text, json or sarif.")] = "text",
    output: Annotated[Path | None, typer.Option(help="Write the report to a file.")] = None,
    gradcheck: Annotated[bool, typer.Option(help="Compare gradients with finite differences too.")] = False,
    allow: Annotated[list[str] | None, typer.Option(help="Rule codes to leave out, as DP001.")] = None,
) -> None:
    """Find in-place writes, graph breaks, host syncs and moving shapes; exit status 1 if there are any."""
    from detpost.purity.command import check as run_check

    status = run_check(targets, shape or (), dtype or (), output_format, output, gradcheck, allow or ())
    if status:
        raise typer.Exit(status)


@app.command()
def bench(
    quick: Annotated[bool, typer.Option(help="Small sizes and few runs.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.png.")] = Path("bench_out"),
) -> None:
    """Time detpost side by side with every installed peer."""
    from detpost.bench import run_benchmark, write_json, write_plot

    with steps() as say:
        rows = run_benchmark(quick, say)
    table = Table("task", "size", "contender", "median us", "times detpost")
    for row in rows:
        size = "x".join(map(str, row.size))
        table.add_row(row.task, size, row.name, f"{row.microseconds:,.0f}", f"{row.ratio:.2f}")
    console.print(table)
    write_json(rows, out / "bench.json")
    write_plot(rows, out / "bench.png")
    console.print(f"{out}/bench.json and {out}/bench.png", highlight=False)


@app.command()
def doctor() -> None:
    """Print versions, devices, and which optional parts are present."""
    from detpost.doctor import examine

    table = Table("part", "", "detail")
    for part in examine():
        table.add_row(part.name, "[green]yes[/]" if part.present else "[yellow]no[/]", part.detail)
    console.print(table)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="tiny, a transformers directory or hub id, or post for a bare decode.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")],
    preset: Annotated[str | None, typer.Option(help=PRESET_HELP)] = None,
    io: Annotated[str, typer.Option(help="Names of inputs and outputs: detpost, rtdetr or efficientnms.")] = "detpost",
    ties: Annotated[str, typer.Option(help="Equal scores: exact in every runtime, or left to the runtime.")] = "exact",
    size: Annotated[str | None, typer.Option(help="Network input as HEIGHTxWIDTH; the model's own by default.")] = None,
    queries: Annotated[bool, typer.Option(help="Give the query of each detection too.")] = False,
    keep_raw: Annotated[bool, typer.Option(help="Give pred_logits and pred_boxes too.")] = False,
    preprocess_inside: Annotated[bool, typer.Option(help="Take uint8 images; scale and normalise inside.")] = False,
    dynamic_size: Annotated[bool, typer.Option(help="Leave the image size free.")] = False,
    static_batch: Annotated[bool, typer.Option(help="Fix the batch size to 1.")] = False,
    num_queries: Annotated[int | None, typer.Option(help="Q, for a bare decode.")] = None,
    num_classes: Annotated[int | None, typer.Option(help="C, for a bare decode.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Most detections per image.")] = None,
    score_threshold: Annotated[float | None, typer.Option(help="Detections at or below it are not valid.")] = None,
    opset: Annotated[int, typer.Option(help="Version of the default operator set.")] = 17,
    exporter: Annotated[str, typer.Option(help="auto, torchscript or dynamo.")] = "auto",
) -> None:
    """Export a detector with its post-processing, or a bare decode: .onnx, .xml (OpenVINO) or .pt2 (AOTInductor).

    For .pt2 only the preset, the size and what belongs to the decode count; its batch is free.
    """
    from detpost.export import package, to_onnx, to_openvino
    from detpost.postprocess import DetectionPostProcessor

    overrides = _given(top_k=top_k, score_threshold=score_threshold)
    if model == "post":
        source: Any = DetectionPostProcessor(_spec(preset or "rtdetr", overrides))
        spec = None
    else:
        source, spec = model, _spec_for(model, preset, overrides)
    with steps() as say:
        if out.suffix == ".pt2":
            example = _raw_example(num_queries, num_classes) if model == "post" else None
            _print_package(package(source, example, out, spec, image_size=_size(size), progress=say))
            return
        written = (to_openvino if out.suffix == ".xml" else to_onnx)(
            source,
            out,
            spec,
            num_queries=num_queries,
            num_classes=num_classes,
            image_size=_size(size),
            dynamic_batch=not static_batch,
            dynamic_size=dynamic_size,
            io=cast(Any, io),
            ties=cast(Any, ties),
            queries=queries,
            keep_raw=keep_raw,
            preprocess_inside=preprocess_inside,
            opset=opset,
            exporter=cast(Any, exporter),
            progress=say,
        )
    _print_written(written)


@app.command()
def attach(
    src: Annotated[Path, typer.Argument(help="An ONNX detector that gives logits and boxes.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")],
    preset: Annotated[str, typer.Option(help=PRESET_HELP)] = "rtdetr",
    logits: Annotated[str | None, typer.Option(help="Name of the logits output; found by its shape.")] = None,
    boxes: Annotated[str | None, typer.Option(help="Name of the boxes output; found by its shape.")] = None,
    io: Annotated[str, typer.Option(help="Names of inputs and outputs: detpost, rtdetr or efficientnms.")] = "detpost",
    ties: Annotated[str, typer.Option(help="Equal scores: exact in every runtime, or left to the runtime.")] = "exact",
    queries: Annotated[bool, typer.Option(help="Give the query of each detection too.")] = False,
    keep_raw: Annotated[bool, typer.Option(help="Keep the raw outputs as pred_logits and pred_boxes.")] = False,
    top_k: Annotated[int | None, typer.Option(help="Most detections per image.")] = None,
    score_threshold: Annotated[float | None, typer.Option(help="Detections at or below it are not valid.")] = None,
) -> None:
    """Put post-processing behind an ONNX detector that someone else exported."""
    from detpost.export import attach as attach_file

    spec = _spec(preset, _given(top_k=top_k, score_threshold=score_threshold))
    with steps() as say:
        written = attach_file(
            src,
            out,
            spec,
            logits=logits,
            boxes=boxes,
            io=cast(Any, io),
            ties=cast(Any, ties),
            queries=queries,
            keep_raw=keep_raw,
            progress=say,
        )
    _print_written(written)


@app.command()
def verify(
    artifact: Annotated[str, typer.Argument(help="What to verify: a file of detpost's, a detector, or a preset.")],
    reference: Annotated[str, typer.Argument(help="What it must agree with.")],
    images: Annotated[list[Path] | None, typer.Option("--image", help="An image to compare detectors on.")] = None,
    threshold: Annotated[float, typer.Option(help="Detections above it must have a partner.")] = 0.3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report as JSON.")] = None,
) -> None:
    """Compare two artifacts; exit status 1 on any difference."""
    from detpost.export import verify as verify_artifacts

    with steps() as say:
        report = verify_artifacts(artifact, reference, images=images, threshold=threshold, progress=say)
    if json_file is not None:
        json_file.write_text(report.to_json() + "\n")
    console.print(str(report), highlight=False, markup=False, soft_wrap=True)
    if not report.ok:
        raise typer.Exit(1)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _spec(preset: str, overrides: dict[str, Any]) -> DecodeSpec:
    return DecodeSpec.preset(preset, **overrides)


def _spec_for(model: str, preset: str | None, overrides: dict[str, Any]) -> DecodeSpec | None:
    """The spec of a transformers detector: the preset asked for, else its family's, with the options given."""
    if preset is not None:
        return _spec(preset, overrides)
    if not overrides:
        return None
    from detpost.integrations.transformers import load_detector

    return replace(load_detector(model).spec, **overrides)


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"--size must be HEIGHTxWIDTH, as 640x640; got {text!r}")
    return int(parts[0]), int(parts[1])


def _raw_example(num_queries: int | None, num_classes: int | None) -> Any:
    import torch

    if num_queries is None or num_classes is None:
        raise ValueError("a bare decode needs --num-queries and --num-classes")
    return torch.zeros(2, num_queries, num_classes), torch.zeros(2, num_queries, 4)


def _print_package(written: Any) -> None:
    names = f"inputs {', '.join(written.inputs)}; outputs {', '.join(written.outputs)}"
    console.print(f"{written.path}: {written.kind}, {names}", highlight=False, soft_wrap=True)


def _print_written(written: Any) -> None:
    for note in written.notes:
        console.print(f"- {note}", highlight=False, markup=False)
    names = f"inputs {', '.join(written.inputs)}; outputs {', '.join(written.outputs)}"
    opset = f"opset {written.opset}, " if hasattr(written, "opset") else ""
    console.print(f"{written.path}: {opset}{names}", highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command; an error of the user's making is one line, not a stack trace."""
    try:
        app()
    except (ImportError, OSError, TypeError, ValueError) as error:
        # Without markup: the extras that a message names stand in square brackets.
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", highlight=False, markup=False)
        sys.exit(2)
