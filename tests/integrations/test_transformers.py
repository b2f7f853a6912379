"""Each family's own image processor against ours: the decode of its config, the function, the patched processor."""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from detpost import DecodeSpec, DetectionPostProcessor, boxes
from detpost.integrations.transformers import patched, post_process_object_detection
from tests.detectors import FAMILIES, SIDE, TEXT_FAMILIES, detector, prompt
from tests.mixin import assert_same, one_line

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peers

# The image processor that each family's checkpoints name.
PROCESSORS = {
    "rt_detr": "RTDetr",
    "rt_detr_v2": "RTDetr",
    "d_fine": "RTDetr",
    "deimv2": "RTDetr",
    "rf_detr": "RfDetr",
    "lw_detr": "DeformableDetr",
    "deformable_detr": "DeformableDetr",
    "conditional_detr": "ConditionalDetr",
    "dab_detr": "ConditionalDetr",
    "detr": "Detr",
    "table_transformer": "Detr",
    "yolos": "Yolos",
    "owlvit": "OwlViT",
    "owlv2": "Owlv2",
    "grounding_dino": "GroundingDino",
    "mm_grounding_dino": "GroundingDino",
}
BY_QUERY = ("Detr", "Yolos", "OwlViT", "Owlv2", "GroundingDino")  # these keep the order of the queries
SIZES = torch.tensor([[480, 640], [33, 77], [1000, 10]])
GIVEN = {
    "tensor": lambda sizes: sizes,
    "floats": lambda sizes: sizes.float(),
    "list": lambda sizes: [tuple(row) for row in sizes.tolist()],
    "none": lambda sizes: None,
}


def processor_of(name):
    return getattr(transformers, f"{name}ImageProcessor")()


def hold(ours, theirs, sizes=None):
    """Equal counts, labels and order; scores and boxes to rounding."""
    assert len(ours) == len(theirs)
    extent = 1.0 if sizes is None else float(sizes.max())
    for mine, yours in zip(ours, theirs, strict=True):
        assert set(mine) == set(yours) == {"scores", "labels", "boxes"}
        assert_same(mine["labels"], yours["labels"])
        torch.testing.assert_close(mine["scores"], yours["scores"], rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(mine["boxes"], yours["boxes"], rtol=1e-6, atol=1e-6 * extent)


def test_every_small_model_has_its_processor():
    assert set(PROCESSORS) == set(FAMILIES) | set(TEXT_FAMILIES)
    named = transformers.models.auto.image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES
    for family, name in PROCESSORS.items():
        entry = named.get(family) or named.get(family.replace("_", "-"))
        if entry is not None:  # RT-DETRv2, D-FINE and DAB-DETR name theirs in their checkpoints alone
            assert entry["torchvision"] == f"{name}ImageProcessor"


# --- real models ---


@functools.cache
def run(family):
    """A small model's config and its outputs for two images, with ties broken: no order among them is promised."""
    model = detector(family)
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        outputs = model(pixel_values=images, **(prompt(family, 2) if family in TEXT_FAMILIES else {}))
    steps = torch.randperm(outputs.logits.numel(), generator=torch.Generator().manual_seed(6))
    outputs.logits = outputs.logits + 1e-5 * steps.reshape(outputs.logits.shape)
    return model.config, outputs


def thresholds(theirs):
    """Zero, and one that keeps about half of what zero keeps."""
    scores = torch.cat([image["scores"] for image in theirs]).sort().values
    assert len(scores) > 10
    middle = len(scores) // 2
    return 0.0, float(scores[middle - 1 : middle + 1].mean())


def theirs_of(family, config, outputs, threshold, sizes, **more):
    if family == "lw_detr":  # its config keeps all queries, the processor that it borrows 100
        more = {"top_k": config.num_queries} | more
    return processor_of(PROCESSORS[family]).post_process_object_detection(
        outputs, threshold=threshold, target_sizes=sizes, **more
    )


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("family", PROCESSORS)
def test_the_spec_of_a_models_config_decodes_as_its_own_processor(family, given):
    config, outputs = run(family)
    sizes = SIZES[:2]
    kept = []
    for threshold in thresholds(theirs_of(family, config, outputs, 0.0, None)):
        theirs = theirs_of(family, config, outputs, threshold, GIVEN[given](sizes))
        if family == "rf_detr":  # as RF-DETR's own package does, and transformers' copy of it does not
            edges = [(1.0, 1.0)] * 2 if given == "none" else sizes
            theirs = [{**one, "boxes": boxes.clip(one["boxes"], size)} for one, size in zip(theirs, edges, strict=True)]
        ours_sizes = None if given == "none" else sizes
        if family == "owlv2" and ours_sizes is not None:  # padded to a square
            ours_sizes = sizes.amax(1, keepdim=True).expand(-1, 2)
        found = DetectionPostProcessor(DecodeSpec.from_config(config, score_threshold=threshold))(
            outputs.logits, outputs.pred_boxes, ours_sizes
        )
        ours = []
        for image in found.to_list():
            order = image["queries"].argsort() if PROCESSORS[family] in BY_QUERY else slice(None)
            ours.append({name: image[name][order] for name in ("scores", "labels", "boxes")})
        hold(ours, theirs, ours_sizes)
        kept.append(sum(len(one["labels"]) for one in theirs))
    assert kept[0] > kept[1] > 0


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("family", PROCESSORS)
def test_the_function_equals_the_processors_method_on_a_models_outputs(family, given):
    config, outputs = run(family)
    processor = processor_of(PROCESSORS[family])
    theirs_method = processor.post_process_object_detection
    sizes = GIVEN[given](SIZES[:2])
    hold(post_process_object_detection(outputs, target_sizes=sizes), theirs_method(outputs, target_sizes=sizes), SIZES)
    takes_top_k = "top_k" in inspect.signature(theirs_method).parameters
    for threshold in thresholds(theirs_method(outputs, 0.0)):
        for more in ({}, {"top_k": 1}, {"top_k": 17}, {"top_k": 10_000}) if takes_top_k else ({},):
            theirs = theirs_method(outputs, threshold, sizes, **more)
            for told in (None, processor, config, config.model_type, SimpleNamespace(config=config)):
                hold(post_process_object_detection(outputs, threshold, sizes, **more, family=told), theirs, SIZES)


def test_grounding_dinos_boxes_and_scores_equal_its_grounded_ones():
    _, outputs = run("grounding_dino")
    ids = prompt("grounding_dino", 2)["input_ids"]
    stub = SimpleNamespace(batch_decode=lambda rows: [""] * len(rows))  # the phrases are the tokeniser's part
    method = transformers.GroundingDinoProcessor.post_process_grounded_object_detection
    for threshold in thresholds(post_process_object_detection(outputs, 0.0)):
        theirs = method(stub, outputs, ids, threshold=threshold, target_sizes=SIZES[:2])
        ours = post_process_object_detection(outputs, threshold, SIZES[:2])
        for mine, yours in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine["scores"], yours["scores"])
            torch.testing.assert_close(mine["boxes"], yours["boxes"])


# --- wide scores through every processor class ---


def wide(batch=3, queries=40, classes=7, seed=0):
    """Outputs whose scores cover (0, 1) and differ, and whose boxes leave the image."""
    generator = torch.Generator().manual_seed(seed)
    count = batch * queries * classes
    logits = torch.linspace(-9, 9, count)[torch.randperm(count, generator=generator)]
    return SimpleNamespace(
        logits=logits.reshape(batch, queries, classes),
        pred_boxes=torch.rand(batch, queries, 4, generator=generator) * 1.4 - 0.2,
    )


CLASSES = [
    name + backend
    for name in dict.fromkeys(PROCESSORS.values())
    for backend in ("ImageProcessor", "ImageProcessorPil")
    if hasattr(transformers, name + backend)
]


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("name", CLASSES)
def test_a_patched_processor_equals_itself(name, given):
    processor = getattr(transformers, name)()
    sizes, outputs = GIVEN[given](SIZES), wide()
    kept = []
    for threshold in (0.0, 0.1, 0.35, 0.9, 0.999, 1.0, -1.0):
        theirs = processor.post_process_object_detection(outputs, threshold=threshold, target_sizes=sizes)
        with patched(processor) as same:
            assert same is processor
            hold(processor.post_process_object_detection(outputs, threshold, sizes), theirs, SIZES)
            by_name = processor.post_process_object_detection(target_sizes=sizes, threshold=threshold, outputs=outputs)
        hold(by_name, theirs, SIZES)
        kept.append(sum(len(one["labels"]) for one in theirs))
    assert kept[0] == kept[-1] >= kept[2] > kept[4] >= kept[5] == 0
    theirs = processor.post_process_object_detection(outputs)  # every default
    with patched(processor):
        hold(processor.post_process_object_detection(outputs), theirs)


@pytest.mark.parametrize("name", CLASSES)
def test_the_fourth_argument_of_a_patched_processor_is_the_processors_own(name):
    processor = getattr(transformers, name)()
    parameters = inspect.signature(processor.post_process_object_detection).parameters
    for top_k in (1, 13, 100_000) if "top_k" in parameters else ():
        theirs = processor.post_process_object_detection(wide(), 0.1, SIZES, top_k)
        with patched(processor):
            hold(processor.post_process_object_detection(wide(), 0.1, SIZES, top_k), theirs, SIZES)
            hold(processor.post_process_object_detection(wide(), 0.1, SIZES, top_k=top_k), theirs, SIZES)
    if "use_focal_loss" in parameters:
        theirs = processor.post_process_object_detection(wide(), 0.1, SIZES, True)
        with patched(processor):
            hold(processor.post_process_object_detection(wide(), 0.1, SIZES, True), theirs, SIZES)
    for wrong in ({"top_q": 1}, {} if "top_k" in parameters else {"top_k": 3}):
        if wrong:
            with patched(processor), pytest.raises(TypeError, match=next(iter(wrong))):
                processor.post_process_object_detection(wide(), **wrong)


# --- patching ---


def test_a_block_restores_the_processor_also_after_an_error_and_nested():
    processor = processor_of("Detr")
    cls, before, method = type(processor), dict(vars(processor)), processor.post_process_object_detection

    def nested():
        with patched(processor):
            with patched(processor):
                assert isinstance(processor, cls)
                assert processor.post_process_object_detection != method
            assert processor.post_process_object_detection != method, "the inner block must not undo the outer one"
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        nested()
    assert type(processor) is cls
    assert vars(processor) == before
    assert processor.post_process_object_detection == method


def test_a_block_touches_no_other_instance_and_keeps_signature_and_configuration():
    processor, other = processor_of("RfDetr"), processor_of("RfDetr")
    plain = processor.to_json_string()
    signature = inspect.signature(processor.post_process_object_detection)
    with patched(processor):
        assert other.post_process_object_detection.__func__ is type(other).post_process_object_detection
        assert inspect.signature(processor.post_process_object_detection) == signature
        assert processor.to_json_string() == plain, "what is saved inside a block is the processor's own"
        assert repr(processor) == repr(other)


def test_a_method_set_on_the_instance_comes_back_after_the_block():
    processor = processor_of("Detr")
    processor.post_process_object_detection = mine = lambda *arguments: "mine"
    with patched(processor):
        assert len(processor.post_process_object_detection(wide())) == 3
    assert processor.post_process_object_detection is mine


def test_the_subclass_of_a_processor_is_known():
    class Mine(transformers.Owlv2ImageProcessor):
        pass

    theirs = Mine().post_process_object_detection(wide(), 0.2, SIZES)
    with patched(Mine()) as processor:
        hold(processor.post_process_object_detection(wide(), 0.2, SIZES), theirs, SIZES)


@pytest.mark.parametrize("name", ["OwlViT", "Owlv2"])
def test_the_processor_that_holds_an_image_processor_follows(name):
    holder = SimpleNamespace(image_processor=processor_of(name))
    method = getattr(transformers, f"{name}Processor").post_process_grounded_object_detection
    phrases = [list("abcdefg")] * 3
    theirs = method(holder, wide(), threshold=0.3, target_sizes=SIZES, text_labels=phrases)
    with patched(holder):
        ours = method(holder, wide(), threshold=0.3, target_sizes=SIZES, text_labels=phrases)
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine.pop("text_labels") == yours.pop("text_labels")
    hold(ours, theirs, SIZES)


def test_the_object_detection_pipeline_follows():
    from PIL import Image

    processor = transformers.DetrImageProcessor(size={"height": SIDE, "width": SIDE})
    pipe = transformers.pipeline("object-detection", model=detector("detr"), image_processor=processor, device="cpu")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 80, 3), np.uint8))
    theirs = pipe(image, threshold=0.0)
    calls = []
    with patched(processor):
        inner = processor.post_process_object_detection
        processor.post_process_object_detection = lambda *a, **k: calls.append(1) or inner(*a, **k)
        ours = pipe(image, threshold=0.0)
        del processor.post_process_object_detection
    assert calls
    assert len(theirs) == 20
    assert [one["label"] for one in ours] == [one["label"] for one in theirs]
    assert [one["box"] for one in ours] == [one["box"] for one in theirs]


# --- what is refused ---


@pytest.mark.parametrize("name", ["PPDocLayoutV2", "PPDocLayoutV3", "PPOCRV5ServerDet", "Sam3", "ViT"])
def test_a_processor_with_another_decode_is_refused_in_one_line(name):
    processor = getattr(transformers, f"{name}ImageProcessor")()
    with (
        pytest.raises(TypeError, match=f"no decode known for {name}ImageProcessor.*rt_detr") as error,
        patched(processor),
    ):
        pytest.fail("must not get here")
    one_line(error)


@pytest.mark.parametrize(
    ("arguments", "kind", "pattern"),
    [
        ({}, TypeError, "no decode known for SimpleNamespace: give family="),
        ({"family": "bert"}, TypeError, "no decode known for 'bert'"),
        ({"family": "detr", "top_k": 5}, TypeError, "top_k is not an argument of this family's processor"),
        ({"family": "rf_detr", "use_focal_loss": False}, TypeError, "use_focal_loss is not an argument"),
        ({"family": "rf_detr", "top_k": 0}, ValueError, "top_k must be at least 1; got 0"),
        ({"family": "rf_detr", "top_k": True}, TypeError, "top_k must be an int; got True"),
        ({"family": "detr", "target_sizes": [(4, 5)]}, ValueError, "one pair for each of 3 images"),
        ({"family": "detr", "target_sizes": SIZES[:2]}, ValueError, "one pair for each of 3 images"),
        ({"family": "detr", "target_sizes": [(4, 5, 3)] * 3}, ValueError, "target_sizes must hold pairs"),
    ],
)
def test_a_wrong_call_is_one_clear_line(arguments, kind, pattern):
    with pytest.raises(kind, match=pattern) as error:
        post_process_object_detection(wide(), **arguments)
    one_line(error)


# --- the rows of docs/drop-ins.md ---


def test_equal_logits_keep_the_order_of_query_and_class():
    outputs = wide()
    outputs.logits = (outputs.logits / 2).round() * 2  # a coarse quantiser
    ours = post_process_object_detection(outputs, 0.0, top_k=60, family="deformable_detr")
    theirs = processor_of("DeformableDetr").post_process_object_detection(outputs, 0.0, top_k=60)
    order = outputs.logits.flatten(1).argsort(dim=1, descending=True, stable=True)[:, :60]
    for mine, yours, flat in zip(ours, theirs, order, strict=True):
        assert_same(mine["labels"], flat % 7)
        torch.testing.assert_close(mine["scores"], yours["scores"])  # which pairs make them is chance there
    assert any(not torch.equal(mine["labels"], yours["labels"]) for mine, yours in zip(ours, theirs, strict=True))


def test_logits_whose_sigmoids_round_to_one_keep_their_order():
    outputs = SimpleNamespace(logits=torch.tensor([[[20.0], [40.0], [30.0]]]), pred_boxes=torch.rand(1, 3, 4))
    found = post_process_object_detection(outputs, family="rt_detr")[0]
    assert found["scores"].tolist() == [1.0, 1.0, 1.0]
    corners = boxes.convert(outputs.pred_boxes[0], "cxcywh", "xyxy")
    torch.testing.assert_close(found["boxes"], corners[[1, 2, 0]])


def test_nan_takes_no_place_among_the_top_k():
    outputs = wide(batch=1)
    outputs.logits[0, :3] = float("nan")
    clean = SimpleNamespace(logits=outputs.logits[:, 3:], pred_boxes=outputs.pred_boxes[:, 3:])
    expected = processor_of("ConditionalDetr").post_process_object_detection(clean, 0.0, top_k=25)
    hold(post_process_object_detection(outputs, 0.0, top_k=25, family="conditional_detr"), expected)
    theirs = processor_of("ConditionalDetr").post_process_object_detection(outputs, 0.0, top_k=25)
    assert len(theirs[0]["scores"]) == 4  # 21 NaN took the places
    assert len(post_process_object_detection(outputs, 0.0, family="detr")[0]["scores"]) == 37


def test_without_focal_loss_the_softmax_runs_over_the_classes():
    outputs = wide()
    ours = post_process_object_detection(outputs, 0.0, SIZES, use_focal_loss=False, family="rt_detr")
    hold(ours, processor_of("Detr").post_process_object_detection(outputs, 0.0, SIZES), SIZES)
    one = SimpleNamespace(logits=outputs.logits[:1], pred_boxes=outputs.pred_boxes[:1])
    theirs = processor_of("RTDetr").post_process_object_detection(one, 0.0, use_focal_loss=False)
    assert theirs[0]["scores"].eq(1).all()  # there it runs over the images: of one image, every score is 1


def test_half_precision_is_scored_in_float32():
    outputs = wide()
    half = SimpleNamespace(logits=outputs.logits.half(), pred_boxes=outputs.pred_boxes.half())
    ours = post_process_object_detection(half, 0.0, family="detr")
    assert {one["scores"].dtype for one in ours} == {torch.float32}
    again = SimpleNamespace(logits=half.logits.float(), pred_boxes=half.pred_boxes.float())
    hold(ours, processor_of("Detr").post_process_object_detection(again, 0.0))
    theirs = processor_of("Detr").post_process_object_detection(half, 0.0)
    assert {one["scores"].dtype for one in theirs} == {torch.float16}


def test_a_score_equal_to_the_threshold_is_dropped_there_and_here():
    outputs = SimpleNamespace(logits=torch.zeros(1, 1, 2), pred_boxes=torch.rand(1, 1, 4))
    assert len(post_process_object_detection(outputs, 0.5, family="rt_detr")[0]["scores"]) == 0
    assert len(processor_of("RTDetr").post_process_object_detection(outputs, 0.5)[0]["scores"]) == 0


def test_gradients_reach_logits_and_boxes():
    outputs = wide()
    outputs.logits.requires_grad_()
    outputs.pred_boxes.requires_grad_()
    found = post_process_object_detection(outputs, 0.3, SIZES, family="owlvit")
    sum((one["scores"].sum() + one["boxes"].sum()) for one in found).backward()
    assert outputs.logits.grad.ne(0).any()
    assert outputs.pred_boxes.grad.ne(0).any()
