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
from rich.markup import escape
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


MODEL_HELP = "tiny, a transformers directory or hub id, or an .onnx, .xml or .pt2 file of detpost's."
BACKEND_HELP = "What runs a transformers detector: eager, compile, onnx, openvino or cudagraph."
CATEGORIES_HELP = "How classes find their category in the annotations: auto, name, order or label."


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
    from detpost.command.demo import run_demo
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
def detect(
    images: Annotated[list[str], typer.Argument(help="Folders, files or glob patterns.")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "tiny",
    backend: Annotated[str, typer.Option(help=BACKEND_HELP)] = "eager",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; CUDA where there is one.")] = None,
    batch: Annotated[int, typer.Option(help="Most images that go through the network at once.")] = 8,
    threshold: Annotated[float, typer.Option(help="Detections with a score above it are kept.")] = 0.5,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")] = Path("detections"),
    formats: Annotated[list[str] | None, typer.Option("--format", help="coco, jsonl or csv; may be repeated.")] = None,
    draw: Annotated[bool, typer.Option("--draw", help="Write annotated pictures too.")] = False,
    annotations: Annotated[
        Path | None, typer.Option(help="COCO annotation file that gives image and category ids.")
    ] = None,
    categories: Annotated[str, typer.Option(help=CATEGORIES_HELP)] = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", "--overwrite", help="Drop an earlier run and start over.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit status 1 if an image was skipped.")] = False,
    max_pixels: Annotated[int, typer.Option(help="Images with more pixels are skipped.")] = 178_956_970,
    workers: Annotated[int | None, typer.Option(help="Threads that decode images; one per core, at most 4.")] = None,
) -> None:
    """Detect in a folder of any size; an interrupted run goes on where it stopped when started again."""
    from detpost.runs.detect import detect as run_detect

    with _progress("images") as tell, _resumable(out):
        summary = run_detect(
            images,
            out,
            model=model,
            backend=backend,
            device=device,
            batch_size=batch,
            threshold=threshold,
            formats=formats or ["coco"],
            draw=draw,
            annotations=annotations,
            categories=categories,
            fresh=fresh,
            max_pixels=max_pixels,
            workers=workers,
            progress=tell,
        )
    _print_summary(summary)
    if strict and summary.skipped:
        raise typer.Exit(1)


@app.command()
def evaluate(
    annotations: Annotated[Path, typer.Argument(help="COCO ground truth.")],
    results: Annotated[Path | None, typer.Option(help="COCO results file; or take --model and --images.")] = None,
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the ground truth's images.")] = None,
    iou_type: Annotated[str, typer.Option(help="bbox, or segm for the masks of a results file.")] = "bbox",
    max_dets: Annotated[str, typer.Option(help="Most detections per image and category, three counts.")] = "1,10,100",
    per_class: Annotated[bool, typer.Option("--per-class", help="AP of each category too.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write it as JSON; - for standard output.")] = None,
    backend: Annotated[str, typer.Option(help=BACKEND_HELP)] = "eager",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; CUDA where there is one.")] = None,
    batch: Annotated[int, typer.Option(help="Most images that go through the network at once.")] = 8,
    threshold: Annotated[float, typer.Option(help="Detections of the model with a score above it count.")] = 0.0,
    categories: Annotated[str, typer.Option(help=CATEGORIES_HELP)] = "auto",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to keep the model's results in.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", "--overwrite", help="Drop an earlier run and start over.")] = False,
) -> None:
    """Compute COCO's AP and AR, equal to pycocotools', of a results file or of a model on a folder of images."""
    from detpost.runs.evaluate import evaluate as evaluate_results
    from detpost.runs.evaluate import evaluate_model

    counts = _counts(max_dets)
    if (results is None) == (model is None) or (model is None) != (images is None):
        raise ValueError("evaluate takes --results FILE, or --model MODEL with --images FOLDER")
    quiet = str(json_file) == "-"
    if results is not None:
        found = evaluate_results(annotations, results, iou_type=iou_type, max_dets=counts)
    else:
        assert images is not None
        if iou_type != "bbox":
            raise ValueError(f"a model is evaluated on boxes: --iou-type {iou_type} takes --results")
        with _progress("images", quiet) as tell, _resumable(out):
            found, summary = evaluate_model(
                annotations,
                images,
                out=out,
                threshold=threshold,
                max_dets=counts,
                model=model,
                backend=backend,
                device=device,
                batch_size=batch,
                categories=categories,
                fresh=fresh,
                progress=tell,
            )
        if not quiet:
            _print_skipped(summary)
    if quiet:
        print(found.to_json())
        return
    if json_file is not None:
        json_file.write_text(found.to_json() + "\n")
    _print_evaluation(found, per_class)


@app.command()
def doctor() -> None:
    """Print versions, devices, and which optional parts are present."""
    from detpost.command.doctor import examine

    table = Table("part", "", "detail")
    for part in examine():
        table.add_row(part.name, "[green]yes[/]" if part.present else "[yellow]no[/]", escape(part.detail))
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
    size: Annotated[str | None, typer.Option(help="Network input as HEIGHTxWIDTH, where the source leaves it.")] = None,
    mean: Annotated[str | None, typer.Option(help="Subtracted from pixels of 0..1, as 0.485,0.456,0.406.")] = None,
    std: Annotated[str | None, typer.Option(help="Divides them then, as 0.229,0.224,0.225.")] = None,
) -> None:
    """Put post-processing behind an ONNX detector that someone else exported."""
    from detpost.export import attach as attach_file

    preprocessing = _preprocessing(_size(size), mean, std)
    with steps() as say:
        written = attach_file(
            src,
            out,
            _spec(preset, _given(top_k=top_k, score_threshold=score_threshold)),
            logits=logits,
            boxes=boxes,
            io=cast(Any, io),
            ties=cast(Any, ties),
            queries=queries,
            keep_raw=keep_raw,
            preset=preset,
            image_size=_size(size),
            preprocessing=preprocessing,
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
    from detpost.verify import verify as verify_artifacts

    with steps() as say:
        report = verify_artifacts(artifact, reference, images=images, threshold=threshold, progress=say)
    if json_file is not None:
        json_file.write_text(report.to_json() + "\n")
    console.print(str(report), highlight=False, markup=False, soft_wrap=True)
    if not report.ok:
        raise typer.Exit(1)


@contextlib.contextmanager
def _progress(what: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Show how far a run is, its rate and the time left; on a terminal as a bar, elsewhere as a line now and then."""
    import time

    from rich import progress

    if quiet or not console.is_terminal:
        began, before, last = 0.0, -1, 0.0

        def line(done: int, total: int) -> None:
            nonlocal began, before, last
            now = time.monotonic()
            if before < 0:
                began, before = now, done
            if quiet or (now - last < 5 and before < done < total):
                return
            last = now
            rate = (done - before) / (now - began) if done > before and now > began else 0.0
            pace = f", {rate:.1f}/s, {_clock((total - done) / rate)} left" if rate else ""
            console.print(f"... {done} of {total} {what}{pace}", highlight=False)

        yield line
        return
    columns = [
        progress.TextColumn(what),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[rate]}"),
        progress.TimeRemainingColumn(compact=True),
    ]
    with progress.Progress(*columns, console=console) as bar:
        tasks: list[progress.TaskID] = []

        def advance(done: int, total: int) -> None:
            if not tasks:  # added with what an earlier run did, which then does not count as this one's speed
                tasks.append(bar.add_task(what, total=total, completed=done, rate=""))
            speed = bar.tasks[0].speed
            bar.update(tasks[0], completed=done, rate=f"{speed:.1f}/s" if speed else "")

        yield advance


@contextlib.contextmanager
def _resumable(out: Path | None) -> Iterator[None]:
    """On Ctrl-C say how to go on, in place of a stack trace."""
    try:
        yield
    except KeyboardInterrupt:
        kept = f"; what is finished is in {out}, the same command goes on from there" if out is not None else ""
        Console(stderr=True, soft_wrap=True).print(f"interrupted{kept}", highlight=False, markup=False)
        raise typer.Exit(130) from None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _shown(name: str) -> str:
    """Show a file name on one line, whatever is in it."""
    return name if name.isprintable() else ascii(name)


def _print_skipped(summary: Any, most: int = 20) -> None:
    for name, reason in summary.skipped[:most]:
        console.print(f"skipped {_shown(name)}: {_shown(reason)}", highlight=False, markup=False, soft_wrap=True)
    if len(summary.skipped) > most:
        console.print(f"... and {len(summary.skipped) - most} more, all in skipped.csv", highlight=False)


def _print_summary(summary: Any) -> None:
    _print_skipped(summary)
    if summary.uncategorised:
        console.print(f"{summary.uncategorised} detections are of no category of the annotations", highlight=False)
    count = f"{summary.images} images: {summary.finished} now, {summary.resumed} before, {len(summary.skipped)} skipped"
    if not summary.changed:
        count = f"nothing to do: all {summary.images} images are finished, {len(summary.skipped)} of them skipped"
    files = ", ".join(str(file) for file in summary.files if file.name != "skipped.csv")
    line = f"{count}; {summary.detections} detections in {files}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _print_evaluation(found: Any, per_class: bool) -> None:
    for note in found.notes:
        console.print(f"- {note}", highlight=False, markup=False, soft_wrap=True)
    title = f"{found.iou_type}: {found.images} images, {found.annotations} annotations, {found.results} results"
    table = Table("", "IoU", "area", "most per image", "value", title=title, title_justify="left")
    areas = {"s": "small", "m": "medium", "l": "large"}
    for name, value in found.metrics.items():
        overlap = {"AP50": "0.50", "AP75": "0.75"}.get(name, "0.50:0.95")
        most = name[2:] if name[2:].isdigit() and name.startswith("AR") else str(found.max_dets[-1])
        table.add_row(name, overlap, areas.get(name[-1], "all"), most, f"{value:.3f}")
    console.print(table)
    if per_class:
        classes = Table("category", "name", "annotations", "AP", "AP50", "AP75")
        for row in found.classes:
            values = (f"{value:.3f}" for value in (row.ap, row.ap50, row.ap75))
            classes.add_row(str(row.category_id), _shown(row.name), str(row.annotations), *values)
        console.print(classes)
    if min(found.metrics.values()) < 0:
        console.print("-1: there is no ground truth of that size", highlight=False)


def _counts(text: str) -> list[int]:
    parts = text.replace(",", " ").split()
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise ValueError(f"--max-dets must be three counts, as 1,10,100; got {text!r}")
    return [int(part) for part in parts]


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


def _preprocessing(size: tuple[int, int] | None, mean: str | None, std: str | None) -> Any:
    """Give the preprocessing that --mean and --std say, ``None`` where neither is given."""
    if mean is None and std is None:
        return None
    from detpost.images import Preprocessing

    return Preprocessing(
        *(size or (640, 640)), mean=_three("--mean", mean or "0,0,0"), std=_three("--std", std or "1,1,1")
    )


def _three(option: str, text: str) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} must be three numbers with commas between them; got {text!r}") from None
    return red, green, blue


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
        console.print(f"- {note}", highlight=False, markup=False, soft_wrap=True)
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
