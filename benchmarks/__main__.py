"""``python -m benchmarks``: every installed peer beside detpost, as a table, a JSON file and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.bench import run_benchmark, write_json, write_plot
from detpost.command.cli import console, steps


def bench(
    quick: Annotated[bool, typer.Option(help="Small sizes and few runs.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.png.")] = Path("bench_out"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    only: Annotated[str | None, typer.Option(help="The name of one task, as the table gives it.")] = None,
) -> None:
    """Time detpost side by side with every installed peer."""
    with steps() as say:
        rows = run_benchmark(quick, say, device, only)
    table = Table("task", "size", "contender", "median us", "times detpost", "peak MB")
    for row in rows:
        size = "x".join(map(str, row.size))
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.1f}"
        table.add_row(row.task, size, row.name, f"{row.microseconds:,.0f}", f"{row.ratio:.2f}", peak)
    console.print(table)
    write_json(rows, out / "bench.json")
    write_plot(rows, out / "bench.png")
    console.print(f"{out}/bench.json and {out}/bench.png", highlight=False)


if __name__ == "__main__":
    typer.run(bench)
