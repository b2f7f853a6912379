"""The ``detpost`` command."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand

import detpost
from detpost.command import show
from detpost.export.formats import ENDINGS, FORMATS, format_of
from detpost.export.targets import TARGETS, folder_name, target_of
from detpost.integrations.model_names import check_file, look_up
from detpost.spec import DecodeSpec, presets


class _ExportCommand(TyperCommand):
    """Takes ``--preprocess-inside`` without a value too, as version 0.1 had it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--preprocess-inside" in args:
            place = args.index("--preprocess-inside") + 1
            if args[place : place + 1] not in (["scale"], ["full"]):
                args = [*args[:place], "scale", *args[place:]]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="detpost",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # with it, help waits for a Markdown parser and a highlighter: half a second
    context_settings={"max_content_width": 120},
)

_FORMATS_IN_WORDS = " or ".join(f"{entry.runtime} ({entry.ending})" for entry in FORMATS)
PRESET_HELP = f"How the outputs are decoded: {', '.join(presets())}."
MODEL_HELP = f"tiny, a transformers directory or hub id, kornia:MODEL, or a file of detpost's ({', '.join(ENDINGS)})."
SOURCE_HELP = "tiny, a transformers directory or hub id, kornia:MODEL, or post for a bare decode."
BACKEND_HELP = "What runs a network: eager, compile, onnx, openvino or cudagraph."
FORMAT_HELP = "coco, jsonl, csv, parquet or yolo; may be repeated."
# As detpost.runs.detect.MAX_PIXELS, whose import waits for torch.
_MAX_PIXELS = 178_956_970
DRAFT_HELP = "Decode JPEG files at a reduced scale where the network's input is far smaller; results differ a little."
NMS_HELP = "Drop a box whose IoU with a better one of its class is greater, as 0.7."
MERGE_HELP = "With --tiles: how boxes that overlap become one: nmm (they grow; the default), nms or wbf (their mean)."
CATEGORIES_HELP = "How classes find their category in the annotations: auto, name, order or label."
IO_HELP = "What its runner takes: detpost (default), rtdetr, efficientnms, deepstream, ultralytics, frigate, roboflow."
MASKS_HELP = "Give masks too: network in its own size (logits), image in pixels of the image (bool)."
STYLE_HELP = "With --masks image, how they are read: rfdetr (logits, the default) or dfine_seg (probabilities)."
KEYPOINTS_HELP = "Give keypoints too: pose for one skeleton a query, or how many each class has, as 0,17 (RF-DETR)."
HEAD_HELP = "Give another head too, as NAME or NAME:FIELD=VALUE:...; may be repeated."
ORIENTED_HELP = "Give oriented boxes too, of the network's (B, Q, 5)."
FOR_HELP = f"Write a folder for a runner: {', '.join(target.name for target in TARGETS)}."
TIES_HELP = "Equal scores: exact (by default) in every runtime, or left to onnx."
INSIDE_HELP = "Take uint8 images: scale (also without a value) scales and normalises inside, full resizes too."
LETTERBOX_HELP = "With full: pad images with grey to keep their proportions."
ANTIALIAS_HELP = "With full: whether the trained pipeline's resize was antialiased."
PICKLE_HELP = "Open weights that are pickles (.pth, .pt), which may run code; only where you trust them."
TRUST_HELP = "Run Python code that comes with the model's weights; only where you trust it."
EXPORT_HELP = f"""Export a detector with its post-processing, or a bare decode, to a file for {_FORMATS_IN_WORDS}.

Options that a format has no use for are refused. With --for, OUT is a folder, and what its runner needs is written into
it."""


def _version(asked: bool) -> None:
    if asked:
        print(f"detpost {detpost.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Exact, exportable post-processing for DETR-family detectors."""


@app.command(short_help="Detect digits, export to ONNX, and show that both agree.")
def demo(
    images: Annotated[
        list[Path] | None, typer.Argument(help="Images; the shipped samples where none are given.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for pictures, detections.json and tiny.onnx.")] = Path("demo_out"),
) -> None:
    """Detect digits, draw them, export to ONNX, run that in ONNX Runtime, and show that both agree."""
    from detpost.command.demo import run_demo
    from detpost.zoo import sample_images

    with show.steps() as say:
        result = run_demo(out, images or sample_images(), say)
    show.print_demo(result, out)
    if not result.ok:
        raise typer.Exit(1)


@app.command(short_help="Find in-place writes, graph breaks, host syncs, moving shapes.")
def check(
    targets: Annotated[list[str], typer.Argument(help="Files or folders to read, or package.module:Callable to run.")],
    shape: Annotated[list[str] | None, typer.Option(help="Shape of each input of a callable, as 2,300,80.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Dtype of each input, or one for all.")] = None,
    output_format: Annotated[str, typer.Option("--format", help="text, json or sarif.")] = "text",
    output: Annotated[Path | None, typer.Option(help="Write the report to a file.")] = None,
    gradcheck: Annotated[bool, typer.Option(help="Compare gradients with finite differences too.")] = False,
    allow: Annotated[list[str] | None, typer.Option(help="Rule codes to leave out, as DP001.")] = None,
) -> None:
    """Find in-place writes, graph breaks, host syncs and moving shapes; exit status 1 where there is an error."""
    from detpost.purity.command import check as run_check

    status = run_check(targets, shape or (), dtype or (), output_format, output, gradcheck, allow or ())
    if status:
        raise typer.Exit(status)


@app.command(short_help="Detect in a folder of any size; interrupted runs go on.")
def detect(
    images: Annotated[list[str], typer.Argument(help="Folders, files or glob patterns; or one video.")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "tiny",
    backend: Annotated[str, typer.Option(help=BACKEND_HELP)] = "eager",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; CUDA where there is one.")] = None,
    batch: Annotated[int, typer.Option(help="Most images that go through the network at once.")] = 8,
    threshold: Annotated[float, typer.Option(help="Detections with a score above it are kept.")] = 0.5,
    nms: Annotated[float | None, typer.Option(help=NMS_HELP)] = None,
    out: Annotated[str, typer.Option("--out", "-o", help="Folder for the results.")] = "detections",
    formats: Annotated[list[str] | None, typer.Option("--format", help=FORMAT_HELP)] = None,
    draw: Annotated[bool, typer.Option("--draw", help="Write annotated pictures too.")] = False,
    annotations: Annotated[
        Path | None, typer.Option(help="COCO annotation file that gives image and category ids.")
    ] = None,
    categories: Annotated[str, typer.Option(help=CATEGORIES_HELP)] = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", "--overwrite", help="Drop an earlier run and start over.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit status 1 if an image was skipped.")] = False,
    max_pixels: Annotated[int, typer.Option(help="Images with more pixels are skipped.")] = _MAX_PIXELS,
    workers: Annotated[int | None, typer.Option(help="Threads that decode images; one per core, at most 4.")] = None,
    tiles: Annotated[int | None, typer.Option(help="Cut larger images into tiles of so many pixels, too.")] = None,
    overlap: Annotated[float | None, typer.Option(help="With --tiles: which part neighbours share; 0.2.")] = None,
    merge_by: Annotated[str | None, typer.Option("--merge", help=MERGE_HELP)] = None,
    draft: Annotated[bool, typer.Option("--draft", help=DRAFT_HELP)] = False,
    stride: Annotated[int | None, typer.Option(help="Of a video: take each how manieth frame; 1.")] = None,
    start: Annotated[float | None, typer.Option(help="Of a video: from how many seconds on.")] = None,
    end: Annotated[float | None, typer.Option(help="Of a video: until how many seconds.")] = None,
    engine: Annotated[str, typer.Option(help="What runs it: local (this process), or ray (Ray Data).")] = "local",
    address: Annotated[str | None, typer.Option(help="With ray: a cluster to join; started here by default.")] = None,
    actors: Annotated[int | None, typer.Option(help="With ray: detectors; one a GPU, or for two processors.")] = None,
    name_column: Annotated[str | None, typer.Option(help="With ray: a dataset's column of unique names.")] = None,
    image_column: Annotated[str | None, typer.Option(help="With ray: a dataset's column of images.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help=TRUST_HELP)] = False,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help=PICKLE_HELP)] = False,
) -> None:
    """Detect in a folder of any size; an interrupted run goes on where it stopped when started again.

    An image at an http or https address is fetched into the folder of the results first.

    A video, a file or the address of a stream, gives a line for each frame; it starts over when started again.

    With --engine ray on Ray Data, on this machine or on a cluster: folders, addresses as s3://bucket/photos, Parquet
    files and webdataset's tar files.
    """
    look_up(model)
    if engine not in ("local", "ray"):
        raise ValueError(f"unknown engine {engine!r}: take local or ray")
    options = _given(
        model=model,
        backend=backend,
        device=device,
        batch_size=batch,
        threshold=threshold,
        nms=nms,
        fresh=fresh,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    from detpost.runs.video import is_video  # not before: it waits for torch

    of_video = _given(stride=stride, start=start, end=end)
    if any(map(is_video, images)):
        unfit = _given(
            annotations=annotations,
            categories=None if categories == "auto" else categories,
            max_pixels=None if max_pixels == _MAX_PIXELS else max_pixels,
            workers=workers,
            draft=draft or None,
            engine=None if engine == "local" else engine,
        )
        in_parts = _with_tiling(_given(tiles=tiles, overlap=overlap, merge=merge_by))
        _detect_in_video(images, out, unfit, strict, {**options, **of_video, **in_parts}, formats, draw)
        return
    for name in of_video:
        raise ValueError(f"--{name} is for a video: leave it out")
    of_images = {"annotations": annotations, "categories": categories, "max_pixels": max_pixels}
    options = {**options, **_given(**of_images, formats=formats or (["coco"] if engine == "local" else ["parquet"]))}
    options = {**options, **_with_tiling(_given(tiles=tiles, overlap=overlap, merge=merge_by))}
    only_local = _given(draw=draw or None, draft=draft or None, workers=workers)
    only_ray = _given(address=address, actors=actors, name_column=name_column, image_column=image_column)
    for name in only_ray if engine == "local" else only_local:
        raise ValueError(f"--engine {engine} takes no --{name.replace('_', '-')}: leave it out")
    run: Any
    source: Any = images
    seconds: dict[str, float] = {}
    if engine == "ray":
        from detpost.runs.ray import detect as run
    else:
        from detpost.runs.detect import detect as run
        from detpost.runs.fetching import fetched
        from detpost.runs.find_images import find_images

        source = find_images(fetched(images, out))
        only_local = {**only_local, "stages": seconds.update}
    _quiet_pillow()
    with show.progress("images") as tell, show.resumable(out):
        noted = lambda done, total: tell(done, total, show.waits(seconds))  # noqa: E731
        summary = run(source, out, **options, **only_local, **only_ray, progress=noted)
    show.print_summary(summary)
    if strict and summary.skipped:
        raise typer.Exit(1)


@app.command(short_help="Bring Parquet results together and write them in other formats.")
def merge(
    sources: Annotated[list[Path], typer.Argument(help="Folders of results, or their detections.parquet.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the results; that of one source.")] = None,
    formats: Annotated[list[str] | None, typer.Option("--format", help=FORMAT_HELP)] = None,
    annotations: Annotated[
        Path | None, typer.Option(help="COCO annotation file that gives image and category ids.")
    ] = None,
    categories: Annotated[str, typer.Option(help=CATEGORIES_HELP)] = "auto",
) -> None:
    """Bring Parquet results of one run or many together, sorted by file name, and write them in other formats."""
    from detpost.runs.merge import merge as run_merge

    merged = run_merge(sources, out, formats=formats or ["coco"], annotations=annotations, categories=categories)
    show.print_merged(merged)


@app.command(short_help="Compute COCO's AP and AR.")
def evaluate(
    annotations: Annotated[Path, typer.Argument(help="COCO ground truth.")],
    results: Annotated[Path | None, typer.Option(help="COCO results file; or take --model and --images.")] = None,
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the ground truth's images.")] = None,
    iou_type: Annotated[str, typer.Option(help="bbox, or segm for masks.")] = "bbox",
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
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help=TRUST_HELP)] = False,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help=PICKLE_HELP)] = False,
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
        assert model is not None
        assert images is not None
        look_up(model)
        _quiet_pillow()
        with show.progress("images", quiet) as tell, show.resumable(out):
            found, summary = evaluate_model(
                annotations,
                images,
                out=out,
                iou_type=iou_type,
                threshold=threshold,
                max_dets=counts,
                model=model,
                backend=backend,
                device=device,
                batch_size=batch,
                categories=categories,
                fresh=fresh,
                trust_remote_code=trust_remote_code,
                allow_pickle=allow_pickle,
                progress=tell,
            )
        if not quiet:
            show.print_skipped(summary)
    if quiet:
        print(found.to_json())
        return
    if json_file is not None:
        json_file.write_text(found.to_json() + "\n")
    show.print_evaluation(found, per_class)


@app.command(short_help="Print versions, devices, and which optional parts are present.")
def doctor(
    file: Annotated[Path | None, typer.Argument(help="An .onnx file of detpost's to look at.")] = None,
) -> None:
    """Print versions, devices, and which optional parts are present; or what there is to say of a file."""
    from detpost.command.doctor import examine, examine_file

    show.print_parts(examine() if file is None else examine_file(file))


@app.command(
    cls=_ExportCommand, short_help="Export a detector with its post-processing, or a bare decode.", help=EXPORT_HELP
)
def export(
    model: Annotated[str, typer.Argument(help=SOURCE_HELP)],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write, or folder with --for.")],
    preset: Annotated[str | None, typer.Option(help=PRESET_HELP)] = None,
    io: Annotated[str | None, typer.Option(help=IO_HELP)] = None,
    ties: Annotated[str | None, typer.Option(help=TIES_HELP)] = None,
    size: Annotated[str | None, typer.Option(help="Network input as HEIGHTxWIDTH; the model's own by default.")] = None,
    queries: Annotated[bool, typer.Option(help="Give the query of each detection too.")] = False,
    keep_raw: Annotated[bool, typer.Option(help="Give pred_logits and pred_boxes too.")] = False,
    masks: Annotated[str | None, typer.Option(help=MASKS_HELP)] = None,
    mask_style: Annotated[str, typer.Option(help=STYLE_HELP)] = "rfdetr",
    keypoints: Annotated[str | None, typer.Option(help=KEYPOINTS_HELP)] = None,
    oriented: Annotated[bool, typer.Option(help=ORIENTED_HELP)] = False,
    head: Annotated[list[str] | None, typer.Option(help=HEAD_HELP)] = None,
    preprocess_inside: Annotated[str | None, typer.Option(help=INSIDE_HELP)] = None,
    letterbox: Annotated[bool, typer.Option(help=LETTERBOX_HELP)] = False,
    antialias: Annotated[bool, typer.Option(help=ANTIALIAS_HELP)] = True,
    dynamic_size: Annotated[bool, typer.Option(help="Leave the image size free.")] = False,
    static_batch: Annotated[bool, typer.Option(help="Fix the batch size to 1.")] = False,
    num_queries: Annotated[int | None, typer.Option(help="Q, for a bare decode.")] = None,
    num_classes: Annotated[int | None, typer.Option(help="C, for a bare decode.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Most detections per image.")] = None,
    score_threshold: Annotated[float | None, typer.Option(help="Detections at or below it are not valid.")] = None,
    opset: Annotated[
        int | None, typer.Option(help="Version of the default operator set; 17 by default, 18 by dynamo.")
    ] = None,
    exporter: Annotated[
        str | None, typer.Option(help="auto (dynamo first, by default), dynamo or torchscript.")
    ] = None,
    runner: Annotated[str | None, typer.Option("--for", help=FOR_HELP)] = None,
    name: Annotated[str | None, typer.Option(help="For triton: the model's name.")] = None,
    backend: Annotated[str | None, typer.Option(help="For triton: onnx (by default), tensorrt or openvino.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="For triton and tensorrt: the largest batch; 8.")] = None,
    ensemble: Annotated[bool, typer.Option(help="For triton: the resize as a model of its own, too.")] = False,
    split: Annotated[bool, typer.Option(help="For executorch, litert and coreml: decode in C++ beside it.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help=TRUST_HELP)] = False,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help=PICKLE_HELP)] = False,
) -> None:
    """Export a detector with its post-processing, or a bare decode."""
    target = None if runner is None else target_of(runner)
    taken = format_of(out) if target is None else None
    options = _given(
        num_queries=num_queries,
        num_classes=num_classes,
        image_size=_size(size),
        dynamic_batch=False if static_batch else None,
        dynamic_size=dynamic_size or None,
        io=io,
        ties=ties,
        queries=queries or None,
        keep_raw=keep_raw or None,
        heads=_heads(masks, mask_style, keypoints, oriented, head),
        preprocess_inside=preprocess_inside,
        resize=_resize(preprocess_inside == "full" or ensemble, letterbox, antialias),
        opset=opset,
        exporter=exporter,
    )
    own = _given(name=name, backend=backend, max_batch=max_batch, ensemble=ensemble or None, split=split or None)
    if target is not None:
        target.check(own, _by_name(options))
    elif own:
        raise ValueError(f"{', '.join(own)} go with --for {'|'.join(each.name for each in TARGETS)}")
    elif taken and (unknown := sorted(_by_name({name: options[name] for name in options.keys() & taken.takes_no}))):
        raise ValueError(f"a {taken.ending} file takes no {', '.join(unknown)}: leave it out, or write another format")
    if model != "post":
        look_up(model)
    overrides = _given(top_k=top_k, score_threshold=score_threshold)
    bare = DecodeSpec.preset(preset or "rtdetr", **overrides)
    source: Any
    known: dict[str, Any] = {}
    if model == "post":
        from detpost.postprocess import DetectionPostProcessor

        source, spec = DetectionPostProcessor(bare), None
    else:
        trust = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
        source, spec, known = _detector(model, preset, overrides, trust)
    with show.steps() as say:
        if target is not None:
            named = {"name": folder_name(model)} if "name" in target.takes else {}
            written = target.write()(source, out, spec, progress=say, **{**named, **own}, **options, **known)
        else:
            assert taken is not None
            written = taken.write()(model=source, path=out, spec=spec, progress=say, **options, **known)
    show.print_written(written)


@app.command(short_help="Put post-processing behind an ONNX file of someone else.")
def attach(
    src: Annotated[Path, typer.Argument(help="An ONNX detector, with post-processing of its own or without.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write.")] = None,
    preset: Annotated[str, typer.Option(help=PRESET_HELP)] = "rtdetr",
    logits: Annotated[str | None, typer.Option(help="Name of the logits, an output or not; found by itself.")] = None,
    boxes: Annotated[str | None, typer.Option(help="Name of the boxes, an output or not; found by itself.")] = None,
    listing: Annotated[
        bool, typer.Option("--list", help="List what --logits and --boxes may name, write nothing.")
    ] = False,
    io: Annotated[str, typer.Option(help=IO_HELP)] = "detpost",
    ties: Annotated[str, typer.Option(help=TIES_HELP)] = "exact",
    queries: Annotated[bool, typer.Option(help="Give the query of each detection too.")] = False,
    keep_raw: Annotated[bool, typer.Option(help="Keep the raw outputs as pred_logits and pred_boxes.")] = False,
    masks: Annotated[str | None, typer.Option(help=MASKS_HELP)] = None,
    mask_style: Annotated[str, typer.Option(help=STYLE_HELP)] = "rfdetr",
    mask_source: Annotated[str | None, typer.Option(help="Name of the raw masks; found by itself.")] = None,
    keypoints: Annotated[str | None, typer.Option(help=KEYPOINTS_HELP)] = None,
    keypoint_source: Annotated[str | None, typer.Option(help="Name of the raw keypoints; found by itself.")] = None,
    oriented: Annotated[bool, typer.Option(help=ORIENTED_HELP)] = False,
    oriented_source: Annotated[str | None, typer.Option(help="Name of the raw oriented boxes.")] = None,
    head: Annotated[list[str] | None, typer.Option(help=HEAD_HELP)] = None,
    top_k: Annotated[int | None, typer.Option(help="Most detections per image.")] = None,
    score_threshold: Annotated[float | None, typer.Option(help="Detections at or below it are not valid.")] = None,
    preprocess_inside: Annotated[str | None, typer.Option(help="full takes uint8 images of any size.")] = None,
    letterbox: Annotated[bool, typer.Option(help=LETTERBOX_HELP)] = False,
    antialias: Annotated[bool, typer.Option(help=ANTIALIAS_HELP)] = True,
    size: Annotated[str | None, typer.Option(help="Network input as HEIGHTxWIDTH, where the source leaves it.")] = None,
    mean: Annotated[str | None, typer.Option(help="Subtracted from pixels of 0..1, as 0.485,0.456,0.406.")] = None,
    std: Annotated[str | None, typer.Option(help="Divides them then, as 0.229,0.224,0.225.")] = None,
) -> None:
    """Put post-processing behind an ONNX detector that someone else exported, in place of its own if it has any."""
    check_file(src)
    if listing:
        from detpost.export.raw_values import list_candidates

        show.print_candidates(list_candidates(src))
        return
    if out is None:
        raise ValueError("no --out: name the file to write, or ask for --list")
    spec = DecodeSpec.preset(preset, **_given(top_k=top_k, score_threshold=score_threshold))
    from detpost.export import attach as attach_file

    preprocessing = _preprocessing(_size(size), mean, std)
    if preprocess_inside not in (None, "full"):
        raise ValueError(f"--preprocess-inside of attach must be full; got {preprocess_inside!r}")
    with show.steps() as say:
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
            heads=_heads(masks, mask_style, keypoints, oriented, head, mask_source, keypoint_source, oriented_source)
            or (),
            preset=preset,
            image_size=_size(size),
            preprocessing=preprocessing,
            resize_inside=_resize(preprocess_inside == "full", letterbox, antialias),
            progress=say,
        )
    show.print_written(written)


@app.command(short_help="Write a page that runs a detector in the browser.")
def web(
    model: Annotated[Path, typer.Argument(help="An .onnx file that detpost wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the site.")] = Path("site"),
    runtime: Annotated[
        Path | None, typer.Option(help="Folder with the npm package onnxruntime-web; fetched by npm once by default.")
    ] = None,
    examples: Annotated[list[Path] | None, typer.Option("--example", help="An image that the page offers.")] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Open it on this machine afterwards, until Ctrl-C.")] = False,
) -> None:
    """Write a static page that runs a detector in the browser: no image leaves it, nothing is loaded from elsewhere."""
    from detpost.web import serve as serve_site
    from detpost.web import write_site

    with show.steps() as say:
        written = write_site(model, out, runtime=runtime, examples=examples or (), progress=say)
    show.print_site(written)
    if serve:
        serve_site(written.folder, show.print_line, browser=show.console.is_terminal)


@app.command(short_help="Write a detector in fewer bits (int8, fp16, bf16) with the same detections.")
def quantize(
    model: Annotated[str, typer.Argument(help="An .onnx or .xml file of detpost's in float32, or a model to export.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="What to write, .xml of .xml; its recipe lies beside it.")],
    precision: Annotated[str, typer.Option(help="int8, fp16 or bf16.")] = "int8",
    images: Annotated[
        list[str] | None, typer.Option("--calibrate", help="Folder of images to calibrate and measure on.")
    ] = None,
    keep: Annotated[
        str, typer.Option(help="What stays float32: auto, or names of nodes with commas between.")
    ] = "auto",
    max_loss: Annotated[float, typer.Option(help="Of AP or, without annotations, of matched detections.")] = 0.005,
    annotations: Annotated[Path | None, typer.Option(help="COCO ground truth of the images.")] = None,
    threshold: Annotated[float, typer.Option(help="Without annotations: detections above it are matched.")] = 0.5,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="With int8: zero points of 0, for TensorRT.")] = False,
    recipe: Annotated[Path | None, typer.Option(help="Repeat a recipe, without images.")] = None,
    budget: Annotated[str | None, typer.Option(help="Time that the search may take, as 10m.")] = None,
) -> None:
    """Write a detector in fewer bits with the same detections: the decode stays float32, and what else must."""
    from detpost.runs.find_images import find_images
    from detpost.runs.quantize import quantize as write_quantized
    from detpost.verify.bisect import seconds_of

    look_up(model)
    if recipe is None and not images:
        raise ValueError("no images to calibrate on: name a folder of some with --calibrate")
    seconds = None if budget is None else seconds_of(budget)
    _quiet_pillow()
    found = find_images(images) if images else None
    with show.search() as (say, tell):
        made = write_quantized(
            model,
            out,
            cast(Any, precision),
            [found.root / name for name in found.names] if found else (),
            keep="auto" if keep == "auto" else [name.strip() for name in keep.split(",")],
            max_loss=max_loss,
            annotations=annotations,
            threshold=threshold,
            symmetric=symmetric,
            recipe=recipe,
            budget=seconds,
            progress=say,
            tell=tell,
        )
    show.print_quantized(made)


@app.command(short_help="Say what fewer bits changed in detections, and which nodes it came from.")
def diagnose(
    model: Annotated[str, typer.Argument(help="The version in fewer bits, or in another runtime.")],
    reference: Annotated[str, typer.Argument(help="What it was made from.")],
    images: Annotated[list[str], typer.Option(help="Folders, files or glob patterns of images.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the report: an .html file.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write it as JSON.")] = None,
    threshold: Annotated[float, typer.Option(help="Detections above it are compared.")] = 0.5,
    budget: Annotated[str | None, typer.Option(help="Time that the search may take, as 10m.")] = None,
) -> None:
    """Say what fewer bits changed in detections, and which nodes it came from; a stopped search goes on, repeated."""
    from detpost.runs.find_images import find_images
    from detpost.verify.bisect import seconds_of
    from detpost.verify.diagnose import diagnose as find_out

    for name in (model, reference):
        look_up(name)
    seconds = None if budget is None else seconds_of(budget)
    _quiet_pillow()
    found = find_images(images)
    beside = out or json_file
    journal = None if beside is None else beside.with_name(f".{beside.name}.progress")
    with show.resumable(journal), show.search() as (say, tell):
        diagnosis = find_out(
            model,
            reference,
            [found.root / name for name in found.names],
            threshold=threshold,
            budget=seconds,
            journal=journal,
            progress=say,
            tell=tell,
        )
    if json_file is not None:
        json_file.write_text(diagnosis.to_json() + "\n")
    if out is not None:
        from detpost.verify.diagnosis_page import page

        out.write_text(page(diagnosis), encoding="utf-8")
    if journal is not None and diagnosis.complete:
        journal.unlink(missing_ok=True)
    show.console.print(str(diagnosis), highlight=False, markup=False, soft_wrap=True)


@app.command(short_help="Compare two artifacts; exit status 1 on any difference.")
def verify(
    artifact: Annotated[str, typer.Argument(help="What to verify: a file of detpost's, a detector, or a preset.")],
    reference: Annotated[str, typer.Argument(help="What it must agree with.")],
    images: Annotated[list[Path] | None, typer.Option("--image", help="An image to compare detectors on.")] = None,
    threshold: Annotated[float, typer.Option(help="Detections above it must have a partner.")] = 0.3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report as JSON.")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help=PICKLE_HELP)] = False,
) -> None:
    """Compare two artifacts; exit status 1 on any difference."""
    for name in (artifact, reference):
        if name not in presets():
            look_up(name)
    from detpost.verify import verify as verify_artifacts

    with show.steps() as say:
        report = verify_artifacts(
            artifact, reference, images=images, threshold=threshold, allow_pickle=allow_pickle, progress=say
        )
    if json_file is not None:
        json_file.write_text(report.to_json() + "\n")
    show.console.print(str(report), highlight=False, markup=False, soft_wrap=True)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def conform(
    runner: Annotated[str, typer.Argument(help="A command, run as COMMAND in.npz out.npz, or module:function.")],
    preset: Annotated[str | None, typer.Option(help="Ask about one family alone, for a runner that knows one.")] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", help="Write the report as JSON to a file; - prints it.")
    ] = None,
) -> None:
    """Put a runner of your own to the conformance suite; exit status 1 where it decodes otherwise."""
    from detpost.verify.conformance import conform as put_to_the_suite

    if json_file == "-":
        report = put_to_the_suite(runner, preset)
        print(report.to_json())
    else:
        with show.progress("cases") as tell:
            report = put_to_the_suite(runner, preset, tell)
        if json_file is not None:
            Path(json_file).write_text(report.to_json() + "\n")
        show.console.print(str(report), highlight=False, markup=False, soft_wrap=True)
    if not report.ok:
        raise typer.Exit(1)


def _detect_in_video(
    sources: list[str],
    out: str,
    unfit: dict[str, Any],
    strict: bool,
    options: dict[str, Any],
    formats: list[str] | None,
    draw: bool,
) -> None:
    from detpost.runs.video import detect_video

    if len(sources) > 1:
        raise ValueError(f"a video goes alone; got {len(sources)} sources: name one")
    for name in unfit:
        raise ValueError(f"a video takes no --{name.replace('_', '-')}: leave it out")
    with show.progress("frames") as tell:
        summary = detect_video(sources[0], out, **options, formats=formats or ["jsonl"], draw=draw, progress=tell)
    show.print_video(summary)
    if strict and (summary.stopped or summary.unreadable):
        raise typer.Exit(1)


def _with_tiling(options: dict[str, Any]) -> dict[str, Any]:
    """Give the options of a run, those of tiles as one."""
    given = {name: options[name] for name in ("tiles", "overlap", "merge") if name in options}
    if not given:
        return options
    if "tiles" not in given:
        raise ValueError(f"--{next(iter(given))} goes with --tiles: say how large a tile is, as --tiles 640")
    from detpost.runs.tiles import Tiling

    rest = {name: value for name, value in options.items() if name not in given}
    return {**rest, "tiling": Tiling(size=given.pop("tiles"), **given)}


def _quiet_pillow() -> None:
    """Keep Pillow's remarks on single files off the terminal: what cannot be read is listed in the end."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _counts(text: str) -> list[int]:
    parts = text.replace(",", " ").split()
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise ValueError(f"--max-dets must be three counts, as 1,10,100; got {text!r}")
    return [int(part) for part in parts]


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _detector(
    model: str, preset: str | None, overrides: dict[str, Any], trust: dict[str, bool]
) -> tuple[Any, DecodeSpec | None, dict[str, Any]]:
    """Give what to export, its spec where the options say one, and what a loaded network no longer says of itself."""
    if preset is not None and not any(trust.values()):
        return model, DecodeSpec.preset(preset, **overrides), {}
    if not overrides and not any(trust.values()):
        return model, None, {}
    from detpost.integrations.load import load_detector

    loaded = load_detector(model, **trust)
    spec = replace(loaded.spec, **overrides) if preset is None else DecodeSpec.preset(preset, **overrides)
    return loaded.model, spec, {"preprocessing": loaded.export_preprocessing, "class_names": loaded.class_names}


def _heads(
    masks: str | None,
    style: str,
    keypoints: str | None,
    oriented: bool,
    others: list[str] | None,
    mask: str | None = None,
    points: str | None = None,
    boxes: str | None = None,
) -> tuple[Any, ...] | None:
    """Give what is asked for beside boxes, ``None`` where nothing is."""
    for option, given, needed, wanted in (
        ("--mask-style", style != "rfdetr", "--masks", masks is not None),
        ("--mask-source", mask is not None, "--masks", masks is not None),
        ("--keypoint-source", points is not None, "--keypoints", keypoints is not None),
        ("--oriented-source", boxes is not None, "--oriented", oriented),
    ):
        if given and not wanted:
            raise ValueError(f"{option} goes with {needed}: give that too, or leave it out")
    if masks is None and keypoints is None and not oriented and not others:
        return None
    from detpost.export.heads import KeypointHead, MaskHead, OrientedHead, head_named

    found: list[Any] = []
    if masks is not None:
        found.append(MaskHead(cast(Any, masks), cast(Any, style), mask))
    if keypoints is not None:
        counts = keypoints.split(",")
        if keypoints != "pose" and not all(count.isdigit() for count in counts):
            raise ValueError(f"--keypoints must be pose, or counts as 0,17; got {keypoints!r}")
        per_class = None if keypoints == "pose" else tuple(map(int, counts))
        found.append(KeypointHead(per_class, source=points))
    return (*found, *([OrientedHead(source=boxes)] if oriented else []), *map(head_named, others or ()))


def _by_name(options: dict[str, Any]) -> dict[str, Any]:
    """Give options by the names that they were asked for by: each head for itself."""
    if "heads" not in options:
        return options
    from detpost.export.heads import argument_of

    rest = {name: value for name, value in options.items() if name != "heads"}
    return {**rest, **{argument_of(head): head for head in options["heads"]}}


def _resize(inside: bool, letterbox: bool, antialias: bool) -> Any:
    """Give how images are resized in the file, ``None`` where they are not."""
    if not inside:
        if letterbox or not antialias:
            raise ValueError("--letterbox and --no-antialias are for a resize inside the file: ask for full")
        return None
    from detpost.export import Resize

    return Resize(letterbox, antialias)


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


def main() -> None:
    """Run the command; an error of the user's making is one line, not a stack trace."""
    try:
        app()
    except (ImportError, OSError, TypeError, ValueError) as error:
        from rich.console import Console

        # Without markup: the extras that a message names stand in square brackets.
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", highlight=False, markup=False)
        sys.exit(2)
