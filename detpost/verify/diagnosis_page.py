"""A diagnosis as one HTML file: numbers, what the loss came from, and the images with both sides' boxes."""

from __future__ import annotations

import base64
import html
import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from detpost.verify.changes import Change

if TYPE_CHECKING:
    from detpost.verify.diagnose import Diagnosis

__all__ = ["page"]

_MOST_PICTURES = 24
_SIDE = 420  # pixels of a picture's longer side
_COLOURS = {"lost": "#d1242f", "gained": "#8250df", "relabelled": "#bf8700", "drifted": "#0969da"}
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#1f2328;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse;width:100%}
td,th{border-bottom:1px solid #d1d9e0;padding:.35rem .6rem;text-align:left;vertical-align:top}
td.n,th.n{text-align:right;white-space:nowrap}code{font:13px ui-monospace,monospace;overflow-wrap:anywhere}
.bar{display:inline-block;height:.8em;background:#0969da;vertical-align:baseline}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(20rem,1fr));gap:1.2rem}
figure{margin:0}figcaption{font-size:13px}svg{width:100%;height:auto;background:#eee}
.key{display:inline-block;width:.8em;height:.8em;margin:0 .3em 0 1em}.note{background:#fff8c5;padding:.5rem .8rem}
"""


def page(diagnosis: Diagnosis) -> str:
    """Give the report.

    Args:
        diagnosis: of :func:`detpost.verify.diagnose.diagnose`.

    Returns:
        HTML that loads nothing: pictures are in it, of the two dozen images with the greatest damage.
    """
    title = f"{Path(diagnosis.model).name} against {Path(diagnosis.reference).name}"
    parts = [
        f"<h1>{_text(title)}</h1>",
        *(f'<p class="note">{_text(note)}</p>' for note in diagnosis.notes),
        _summary(diagnosis),
        _findings(diagnosis),
        _modules(diagnosis),
        _pictures(diagnosis),
        _list(diagnosis),
    ]
    head = f'<meta charset="utf-8"><title>{_text(title)}</title><style>{_STYLE}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _summary(diagnosis: Diagnosis) -> str:
    counts = diagnosis.changes.counts
    rows = [
        ("images", str(len(diagnosis.images))),
        ("bits", ", ".join(diagnosis.bits) or "float32"),
        (
            f"detections above {diagnosis.threshold:g}",
            f"{diagnosis.changes.reference} in the reference, {diagnosis.changes.other} in the version",
        ),
        *((kind, str(counts[kind])) for kind in _COLOURS),
        ("borderline", f"{counts['borderline']}: scores moved by 0.1 at the most, over the threshold or under it"),
        ("loss", f"{diagnosis.changes.loss:.4f} of detections have no partner (the same class, IoU of at least 0.75)"),
    ]
    if diagnosis.selection is not None:
        chosen = diagnosis.selection
        share = (
            ""
            if chosen.share is None
            else f" With the reference's queries {chosen.share:.0%} of the {diagnosis.explains} is back."
        )
        rows.append(
            (
                "query selection",
                f"{chosen.node}: the same queries in another order in {chosen.permuted:.0%} of images, which is "
                f"rounding and no damage; others in {chosen.changed:.0%}, {chosen.replaced:.1%} of all queries.{share}",
            )
        )
    return "<h2>What changed</h2>" + _table((), [tuple(map(_text, row)) for row in rows])


def _findings(diagnosis: Diagnosis) -> str:
    if not diagnosis.findings:
        return ""
    rows = [
        (
            f"<code>{_text(finding.node)}</code>",
            _text(finding.operator),
            f"<code>{_text(finding.module)}</code>",
            f"{finding.share:.0%}",
            f"{finding.needed:.0%}",
            "<br>".join(_text(str(each)) for each in finding.evidence[:3]),
        )
        for finding in diagnosis.findings
    ]
    head = ("node", "operator", "module", "alone", "needed", "what is seen")
    text = (
        f"Kept float, these {len(rows)} nodes give {diagnosis.explained:.0%} of the {diagnosis.explains} back. "
        "<em>Alone</em>: what one gives back by itself. <em>Needed</em>: what is lost again without it."
    )
    return f"<h2>Where it came from</h2><p>{text}</p>{_table(head, rows, numbers=(3, 4))}"


def _modules(diagnosis: Diagnosis) -> str:
    if not diagnosis.modules:
        return ""
    rows = [
        (
            f"<code>{_text(name)}</code>",
            f"{share:.0%}",
            f'<span class="bar" style="width:{max(0.0, min(1.0, share)) * 20:.1f}rem"></span>',
        )
        for name, share in diagnosis.modules.items()
    ]
    return f"<h2>What is back when one part alone is float</h2>{_table(('part', 'back', ''), rows, numbers=(1,))}"


def _pictures(diagnosis: Diagnosis) -> str:
    by_image: dict[int, list[Change]] = defaultdict(list)
    for change in diagnosis.changes.changes:
        by_image[change.image].append(change)
    worst = sorted(by_image, key=lambda image: (-sum(not each.borderline for each in by_image[image]), image))
    figures = [_figure(diagnosis, image, by_image[image]) for image in worst[:_MOST_PICTURES]]
    if not figures:
        return ""
    key = "".join(f'<span class="key" style="background:{c}"></span>{kind}' for kind, c in _COLOURS.items())
    text = f"The reference's boxes are whole lines, the version's dashed; what did not change is grey.{key}"
    return f'<h2>Images</h2><p>{text}</p><div class="pictures">{"".join(figures)}</div>'


def _figure(diagnosis: Diagnosis, image: int, changes: Sequence[Change]) -> str:
    from PIL import Image, ImageOps

    path = Path(diagnosis.images[image])
    with Image.open(path) as opened:
        picture = ImageOps.exif_transpose(opened).convert("RGB")
    width, height = picture.size
    shrink = min(1.0, 2 * _SIDE / max(width, height))
    picture = picture.resize((max(1, round(width * shrink)), max(1, round(height * shrink))))
    held = io.BytesIO()
    picture.save(held, "JPEG", quality=85)
    data = base64.b64encode(held.getvalue()).decode()
    unit = max(width, height) / _SIDE
    shapes = [f'<image href="data:image/jpeg;base64,{data}" width="{width}" height="{height}"/>']
    for box in _unchanged(diagnosis, image, changes):
        shapes.append(_box(box, "#6e7781", unit, dashed=False, label=""))
    captions = []
    for change in changes:
        colour = _COLOURS[change.kind]
        name, other = _name(diagnosis, change.label), _name(diagnosis, change.other_label)
        if change.kind == "gained":
            shapes.append(_box(change.box, colour, unit, dashed=True, label=f"{name} {change.other_score:.2f}"))
        else:
            shapes.append(_box(change.box, colour, unit, dashed=False, label=f"{name} {change.score:.2f}"))
            if change.kind in ("relabelled", "drifted") and change.other_box is not None:
                shapes.append(
                    _box(change.other_box, colour, unit, True, f"{other} {change.other_score:.2f}", below=True)
                )
        captions.append(_words(diagnosis, change))
    svg = f'<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">{"".join(shapes)}</svg>'
    return f"<figure>{svg}<figcaption><b>{_text(path.name)}</b>: {_text('; '.join(captions))}</figcaption></figure>"


def _unchanged(diagnosis: Diagnosis, image: int, changes: Sequence[Change]) -> Iterable[tuple[float, ...]]:
    """Give the reference's boxes above the threshold that no change is about."""
    if image >= len(diagnosis.found[0]):
        return
    changed = {change.box for change in changes}
    each = diagnosis.found[0][image]
    for score, box in zip(each["scores"].tolist(), each["boxes"].tolist(), strict=True):
        if score > diagnosis.threshold and tuple(box) not in changed:
            yield tuple(box)


def _box(box: Sequence[float], colour: str, unit: float, dashed: bool, label: str, below: bool = False) -> str:
    left, top, right, bottom = box
    width, height = max(right - left, 0.0), max(bottom - top, 0.0)
    dash = f' stroke-dasharray="{4 * unit:.2f}"' if dashed else ""
    shape = (
        f'<rect x="{left:.2f}" y="{top:.2f}" width="{width:.2f}" height="{height:.2f}" fill="none" stroke="{colour}" '
        f'stroke-width="{2 * unit:.2f}"{dash}/>'
    )
    if not label:
        return shape
    size = 13 * unit
    baseline = bottom + size if below else max(top - 0.25 * size, size)
    text = (
        f'<text x="{max(left, 0):.2f}" y="{baseline:.2f}" font-size="{size:.2f}" font-family="sans-serif" '
        f'fill="{colour}" stroke="#fff" stroke-width="{3 * unit:.2f}" paint-order="stroke">{_text(label)}</text>'
    )
    return shape + text


def _list(diagnosis: Diagnosis) -> str:
    rows = [
        (
            _text(Path(diagnosis.images[change.image]).name),
            _text(change.kind + (" (borderline)" if change.borderline else "")),
            _text(_name(diagnosis, change.label)),
            f"{change.score:.3f}",
            f"{change.other_score:.3f}",
            f"{change.margin:.3f}",
            f"{change.iou:.2f}",
        )
        for change in diagnosis.changes.changes
    ]
    head = ("image", "change", "class", "score before", "after", "above the threshold", "IoU")
    return f"<h2>Every change</h2>{_table(head, rows, numbers=(3, 4, 5, 6))}" if rows else ""


def _words(diagnosis: Diagnosis, change: Change) -> str:
    name, other = _name(diagnosis, change.label), _name(diagnosis, change.other_label)
    scores = f"{change.score:.2f} to {change.other_score:.2f}"
    if change.kind == "relabelled":
        return f"{name} became {other}, {scores}"
    if change.kind == "drifted":
        return f"{name} drifted, IoU {change.iou:.2f}"
    return f"{name} {change.kind}, {scores}" + (" (borderline)" if change.borderline else "")


def _name(diagnosis: Diagnosis, label: int) -> str:
    return (diagnosis.labels or {}).get(label, str(label))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        kinds = (' class="n"' if place in numbers else "" for place in range(len(row)))
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for cell, kind in zip(row, kinds, strict=True))

    top = f"<tr>{cells(list(map(_text, head)), 'th')}</tr>" if head else ""
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<table>{top}{body}</table>"


def _text(value: str) -> str:
    return html.escape(value)
