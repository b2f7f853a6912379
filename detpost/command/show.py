"""What the ``detpost`` command prints: steps, progress, summaries and tables."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

console = Console()


@contextlib.contextmanager
def steps() -> Iterator[Callable[[str], None]]:
    """Show the step that is running; on a terminal as a spinner, elsewhere as lines."""
    if not console.is_terminal:
        yield lambda line: console.print(f"... {line}", highlight=False)
        return
    with console.status("starting") as status:
        yield lambda line: status.update(line)


@contextlib.contextmanager
def search() -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None]]]:
    """Show the steps of a search as lines, and its runs as a bar; off a terminal as a line now and then."""
    say = lambda line: console.print(f"... {line}", highlight=False, markup=False, soft_wrap=True)  # noqa: E731
    with progress("runs") as tell:
        yield say, tell


def print_quantized(made: Any) -> None:
    """Print what was written in fewer bits, and what it cost."""
    print_written(made.written)
    console.print(
        f"{made.size:.3f} of the float file's size; {made.recipe} repeats it", highlight=False, soft_wrap=True
    )


def print_demo(result: Any, out: Path) -> None:
    """Print what was found in each image, and whether PyTorch and ONNX Runtime agree."""
    for image in result.images:
        table = Table("digit", "score", "x1", "y1", "x2", "y2", title=image.name, title_justify="left")
        rows = zip(
            image.found["label_names"], image.found["scores"].tolist(), image.found["boxes"].tolist(), strict=True
        )
        for name, score, box in rows:
            table.add_row(name, f"{score:.3f}", *(f"{value:.1f}" for value in box))
        console.print(table)
    dropped = ", ".join(f"{image.dropped} in {_shown(image.name)}" for image in result.images if image.dropped)
    print_line(
        f"doubled boxes dropped by greedy NMS (IoU above {result.nms}, by class): {dropped or 'none'}; "
        "a set predictor needs no NMS in theory, tiny does"
    )
    agreement = Table("image", "before NMS", "match", "box difference", "score difference", "decode of its raw outputs")
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


def print_parts(parts: Sequence[Any]) -> None:
    """Print what is installed and what is missing."""
    table = Table("part", "", "detail")
    for part in parts:
        table.add_row(part.name, "[green]yes[/]" if part.present else "[yellow]no[/]", escape(part.detail))
    console.print(table)


@contextlib.contextmanager
def progress(what: str, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """Show how far a run is, its rate and the time left; on a terminal as a bar, elsewhere as a line now and then.

    Args:
        what: is counted.
        quiet: show nothing.

    Yields:
        A function of how many are done, how many there are, and, if there is something to say, a note.
    """
    if quiet or not console.is_terminal:
        began, before, last = 0.0, -1, 0.0

        def line(done: int, total: int, note: str = "") -> None:
            nonlocal began, before, last
            now = time.monotonic()
            if before < 0:
                began, before = now, done
            if quiet or (now - last < 5 and before < done < total):
                return
            last = now
            rate = (done - before) / (now - began) if done > before and now > began else 0.0
            pace = f", {rate:.1f}/s, {_clock((total - done) / rate)} left" if rate else ""
            console.print(f"... {done} of {total} {what}{pace}{note and f', {note}'}", highlight=False)

        yield line
        return
    from rich import progress as bars

    columns = [
        bars.TextColumn(what),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[rate]}"),
        bars.TimeRemainingColumn(compact=True),
        bars.TextColumn("{task.fields[note]}"),
    ]
    with bars.Progress(*columns, console=console) as bar:
        tasks: list[bars.TaskID] = []

        def advance(done: int, total: int, note: str = "") -> None:
            if not tasks:  # added with what an earlier run did, which then does not count as this one's speed
                tasks.append(bar.add_task(what, total=total, completed=done, rate="", note=""))
            speed = bar.tasks[0].speed
            bar.update(tasks[0], completed=done, rate=f"{speed:.1f}/s" if speed else "", note=note)

        yield advance


def waits(seconds: Mapping[str, float]) -> str:
    """Say which stage a run has waited for, beside the network; nothing where it hardly did."""
    whole = sum(seconds.values())
    others = {stage: spent / whole for stage, spent in seconds.items() if stage != "network" and spent > 0.05 * whole}
    held_up = [f"{share:.0%} of the time for {stage}" for stage, share in others.items()]
    return f"network waits {', '.join(held_up)}" if held_up else ""


@contextlib.contextmanager
def resumable(out: str | Path | None) -> Iterator[None]:
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


def print_skipped(summary: Any, most: int = 20) -> None:
    """Print the images without a result, and why."""
    for name, reason in summary.skipped[:most]:
        console.print(f"skipped {_shown(name)}: {_shown(reason)}", highlight=False, markup=False, soft_wrap=True)
    if len(summary.skipped) > most:
        console.print(f"... and {len(summary.skipped) - most} more, all in skipped.csv", highlight=False)


def print_summary(summary: Any) -> None:
    """Print what a run did."""
    print_skipped(summary)
    if summary.uncategorised:
        console.print(f"{summary.uncategorised} detections are of no category of the annotations", highlight=False)
    count = f"{summary.images} images: {summary.finished} now, {summary.resumed} before, {len(summary.skipped)} skipped"
    if not summary.changed:
        count = f"nothing to do: all {summary.images} images are finished, {len(summary.skipped)} of them skipped"
    _print_files(count, summary)


def print_merged(merged: Any) -> None:
    """Print what was brought together."""
    if merged.uncategorised:
        console.print(f"{merged.uncategorised} detections are of no category of the annotations", highlight=False)
    _print_files(f"{merged.images} images, {len(merged.skipped)} of them skipped", merged)


def print_video(summary: Any) -> None:
    """Print what was done with a video."""
    for note in (summary.stopped, summary.unreadable and f"{summary.unreadable} packets could not be decoded"):
        if note:
            console.print(note, highlight=False, markup=False, soft_wrap=True)
    _print_files(f"{summary.frames} frames", summary)


def _print_files(count: str, summary: Any) -> None:
    files = ", ".join(str(file) for file in summary.files if file.name != "skipped.csv")
    line = f"{count}; {summary.detections} detections in {files}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_evaluation(found: Any, per_class: bool) -> None:
    """Print COCO's numbers as tables."""
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


def print_candidates(candidates: Sequence[Any]) -> None:
    """Print what may be named as raw values, a line each that a shell can take apart."""
    for candidate in candidates:
        shape = ", ".join(str(size) for size in candidate.shape)
        place = "output" if candidate.place == "output" else f"made by {candidate.place}"
        parts = (candidate.name, f"[{shape}]", candidate.dtype, place, candidate.guess and f"may be {candidate.guess}")
        console.print("  ".join(filter(None, parts)), highlight=False, markup=False, soft_wrap=True)


def print_line(line: str) -> None:
    """Print a line as it is."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_site(written: Any) -> None:
    """Print where a page is, and what should be known of it."""
    for note in written.notes:
        print_line(f"- {note}")
    print_line(f"{written.folder / 'index.html'}: {written.size / 2**20:.0f} MiB in all, for any web server")


def print_written(written: Any) -> None:
    """Print what a file takes and gives, and what was written beside it."""
    for note in written.notes:
        console.print(f"- {note}", highlight=False, markup=False, soft_wrap=True)
    names = f"inputs {', '.join(written.inputs)}; outputs {', '.join(written.outputs)}"
    version = f"opset {written.opset}, " if written.opset else f"{written.kind}, " if written.kind else ""
    console.print(f"{written.path}: {version}{names}", highlight=False, soft_wrap=True)
    for path in written.beside:
        console.print(f"{path}: for the runner", highlight=False, soft_wrap=True)
