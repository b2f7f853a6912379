"""``python -m benchmarks``: every installed peer beside detpost, as a table, a JSON file and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.race import run_benchmark, times
from benchmarks.report import write_json, write_plot, write_table
from detpost.command.show import console, steps


def bench(
    quick: Annotated[bool, typer.Option(help="Small sizes and few runs.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for bench.json, bench.md and bench.png.")] = Path("bench_out"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    only: Annotated[str | None, typer.Option(help="The name of one task, as the table gives it.")] = None,
) -> None:
    """Time detpost side by side with every installed peer."""
    with steps() as say:
        rows = run_benchmark(quick, say, device, only)
    for task, size in dict.fromkeys((row.task, row.size) for row in rows):
        table = Table("contender", "median us", "times detpost", "peak MB", title=f"{task} {times(size)}")
        for row in (row for row in rows if (row.task, row.size) == (task, size)):
            peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.1f}"
            table.add_row(row.name, f"{row.microseconds:,.0f}", f"{row.ratio:.2f}", peak)
        console.print(table)
    write_json(rows, out / "bench.json")
    write_table(rows, out / "bench.md")
    write_plot(rows, out / "bench.png")
    console.print(f"{out}/bench.json, {out}/bench.md and {out}/bench.png", highlight=False)


if __name__ == "__main__":
    typer.run(bench)
