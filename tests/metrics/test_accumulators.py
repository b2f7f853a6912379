import socket

import pytest
import torch
import torch.multiprocessing

from detpost.metrics import (
    AverageSurfaceDistance,
    HausdorffDistance,
    SurfaceDice,
    average_surface_distance,
    hausdorff_distance,
    surface_dice,
)
from tests.mixin import one_line


def batches():
    generator = torch.Generator().manual_seed(2)
    pairs = [[torch.rand(size, 3, 9, 8, generator=generator) < 0.3 for _ in range(2)] for size in (2, 1, 3)]
    for pair in pairs:
        for mask in pair:
            mask[0, 1] = False  # absent in both: nan
    return pairs


METRICS = {
    "hausdorff": (HausdorffDistance, {"percentile": 95}, lambda a, b: hausdorff_distance(a, b, 95)),
    "average": (AverageSurfaceDistance, {"symmetric": False}, lambda a, b: average_surface_distance(a, b, False)),
    "dice": (SurfaceDice, {"tolerance": 1.0}, lambda a, b: surface_dice(a, b, 1.0)),
}


@pytest.mark.parametrize(("kind", "options", "function"), METRICS.values(), ids=METRICS)
def test_batches_one_by_one_give_what_they_give_at_once(kind, options, function):
    whole = torch.cat([function(a, b) for a, b in batches()])
    expected = {"none": whole, "mean_batch": whole.nanmean(0), "mean": whole.nanmean(1).nanmean()}
    for reduction, value in expected.items():
        metric = kind(**options, reduction=reduction)
        for number, (a, b) in enumerate(batches()):
            if number == 1:
                metric.update(a, b)
            else:
                torch.testing.assert_close(metric(a, b), function(a, b), equal_nan=True)
        torch.testing.assert_close(metric.compute(), value, equal_nan=True)
        assert torch.equal(metric.aggregate().nan_to_num(), metric.compute().nan_to_num())
        metric.reset()
        with pytest.raises(ValueError, match="got none") as error:
            metric.compute()
        one_line(error)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("reduction", ["mean", "mean_batch", "none"])
def test_equals_monais_metrics(reduction):
    monai = pytest.importorskip("monai.metrics")
    options = {"include_background": False, "reduction": reduction}
    pairs = [
        (HausdorffDistance(95, **options), monai.HausdorffDistanceMetric(percentile=95, **options)),
        (AverageSurfaceDistance(**options), monai.SurfaceDistanceMetric(symmetric=True, **options)),
        (SurfaceDice([1.0, 2.0], **options), monai.SurfaceDiceMetric(class_thresholds=[1.0, 2.0], **options)),
    ]
    for ours, theirs in pairs:
        for a, b in batches():
            ours(y_pred=a, y=b, spacing=(0.5, 2.0))
            theirs(y_pred=a.float(), y=b.float(), spacing=[0.5, 2.0])
        expected = theirs.aggregate().reshape(ours.aggregate().shape)  # a mean is (1,) there
        torch.testing.assert_close(ours.aggregate(), expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def _one_process(rank, port, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        metric = HausdorffDistance(reduction="none")
        for a, b in batches()[:2] if rank == 0 else batches()[2:]:
            metric.update(a, b)
        torch.save(metric.compute(), f"{path}.{rank}")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_compute_over_all_batches(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = str(tmp_path / "values")
    torch.multiprocessing.spawn(_one_process, (port, path), nprocs=2)
    alone = torch.cat([hausdorff_distance(a, b) for a, b in batches()])
    for rank in range(2):
        torch.testing.assert_close(torch.load(f"{path}.{rank}", weights_only=True), alone, equal_nan=True)


@pytest.mark.parametrize(
    ("call", "pattern"),
    [
        (lambda: HausdorffDistance(reduction="sum"), "got 'sum'"),
        (lambda: HausdorffDistance(percentile=101), "between 0 and 100"),
        (lambda: SurfaceDice(tolerance=-1), "at least 0"),
    ],
)
def test_bad_arguments_are_one_clear_line(call, pattern):
    with pytest.raises(ValueError, match=pattern) as error:
        call()
    one_line(error)
