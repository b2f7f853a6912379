"""The losses and metrics where people train: MONAI's trainer and handlers, a scaler, memory formats, large volumes."""

import pytest
import torch
from torch import nn

from detpost.losses import (
    BoundaryLoss,
    GeneralizedSurfaceLoss,
    HausdorffDTLoss,
    HausdorffERLoss,
    HausdorffERLoss3D,
    HausdorffSchedule,
)
from detpost.metrics import HausdorffDistance, SurfaceDice

LOSSES = {
    "distance": HausdorffDTLoss(to_onehot_y=True),
    "erosion": HausdorffERLoss(k=3),
    "boundary": BoundaryLoss(to_onehot_y=True),
    "surface": GeneralizedSurfaceLoss(to_onehot_y=True),
}


def scene(batch=2, side=16):
    target = torch.zeros(batch, 1, side, side, dtype=torch.int64)
    target[..., 3:9, 4:12] = 1
    return target + 0.1 * torch.randn(target.shape), target


class Objective(nn.Module):
    """Cross entropy and a scheduled term, of logits and class ids, as a trainer calls its loss."""

    def __init__(self, term):
        super().__init__()
        self.term, self.schedule = term, HausdorffSchedule()

    def forward(self, logits, target):
        base = nn.functional.cross_entropy(logits, target[:, 0].long())
        return self.schedule(base, self.term(logits.softmax(1), target.long()))


@pytest.mark.peers
def test_monais_trainer_and_handlers_take_the_loss_the_schedule_and_the_metrics():
    ignite = pytest.importorskip("ignite.engine")
    engines, handlers = pytest.importorskip("monai.engines"), pytest.importorskip("monai.handlers")
    transforms = pytest.importorskip("monai.transforms")
    torch.manual_seed(0)
    network, objective = nn.Conv2d(1, 2, 3, padding=1), Objective(LOSSES["distance"])
    images, labels = scene(4)
    loader = [{"image": images[:2], "label": labels[:2]}, {"image": images[2:], "label": labels[2:]}]
    to_one_hot = transforms.Compose(
        [
            transforms.AsDiscreted(keys="pred", argmax=True, to_onehot=2),
            transforms.AsDiscreted(keys="label", to_onehot=2),
        ]
    )
    pair = handlers.from_engine(["pred", "label"])

    def batched(data):  # MONAI hands over lists of images, as its own metrics take them
        predicted, reference = pair(data)
        return torch.stack(list(predicted)), torch.stack(list(reference))

    distance, dice = HausdorffDistance(include_background=False), SurfaceDice(1, include_background=False)
    evaluator = engines.SupervisedEvaluator(
        device="cpu",
        val_data_loader=loader,
        network=network,
        postprocessing=to_one_hot,
        key_val_metric={"hausdorff": handlers.IgniteMetricHandler(metric_fn=distance, output_transform=batched)},
        additional_metrics={"dice": handlers.IgniteMetricHandler(metric_fn=dice, output_transform=batched)},
    )
    trainer = engines.SupervisedTrainer(
        device="cpu",
        max_epochs=30,
        train_data_loader=loader,
        network=network,
        optimizer=torch.optim.Adam(network.parameters(), 0.1),
        loss_function=objective,
        train_handlers=[handlers.ValidationHandler(validator=evaluator, interval=30)],
    )
    trainer.add_event_handler(ignite.Events.EPOCH_COMPLETED, lambda engine: objective.schedule.step())
    trainer.run()
    assert int(objective.schedule.epoch) == 30
    assert objective.schedule.weight > 0
    assert evaluator.state.metrics["hausdorff"] <= 3
    assert evaluator.state.metrics["dice"] > 0.7


@pytest.mark.parametrize("term", LOSSES.values(), ids=LOSSES)
def test_a_scaler_and_autocast_train_through_an_overflow(term):
    torch.manual_seed(0)
    layer, objective = nn.Conv2d(1, 2, 3, padding=1), Objective(term)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)  # the first step overflows
    images, target = scene()
    before = [parameter.clone() for parameter in layer.parameters()]
    for step in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = objective(layer(images), target)
        scaler.scale(loss * 1e6 if step == 0 else loss).backward()
        scaler.step(optimizer)
        scaler.update(2.0**10 if step == 0 else None)
        if step == 0:
            assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    objective.schedule.step()
    assert objective.schedule.weight.isfinite()
    assert all(parameter.isfinite().all() for parameter in layer.parameters())
    assert not torch.equal(before[0], next(layer.parameters()))


@pytest.mark.parametrize("term", LOSSES.values(), ids=LOSSES)
def test_channels_last_gives_the_same_loss_and_gradient(term):
    images, target = scene()
    logits = torch.cat([-images, images], 1)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = logits.clone(memory_format=layout).requires_grad_()
        value = term(leaf.softmax(1), target.contiguous(memory_format=layout))
        value.backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(*results)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distance", "boundary"])
def test_the_whole_training_step_compiles(name):
    torch.manual_seed(0)
    layer, objective = nn.Conv2d(1, 2, 3, padding=1), Objective(LOSSES[name])
    images, target = scene()

    def step(images, target):
        loss = objective(layer(images), target)
        loss.backward()
        return loss.detach()

    torch._dynamo.reset()
    compiled = torch.compile(step)
    expected = step(images, target)
    gradient = layer.weight.grad.clone()
    layer.zero_grad()
    torch.testing.assert_close(compiled(images, target), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.weight.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "term",
    [HausdorffDTLoss(to_onehot_y=True), HausdorffERLoss3D(k=2), BoundaryLoss(to_onehot_y=True)],
    ids=["distance", "erosion", "boundary"],
)
def test_a_volume_of_128_a_side_trains(term):
    logits = torch.zeros(1, 2, 128, 128, 128)
    logits[:, 1, 60:] = 3.0  # wrong in thick parts, of which erosions leave something
    logits.requires_grad_()
    target = torch.zeros(1, 1, 128, 128, 128, dtype=torch.int64)
    target[..., 30:90, 40:100, 20:70] = 1
    term(logits.softmax(1), target).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.any()
