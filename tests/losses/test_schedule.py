import socket

import pytest
import torch
import torch.multiprocessing
from torch import nn

from detpost.losses import HausdorffDTLoss, HausdorffSchedule
from tests.mixin import one_line


def epoch(schedule, pairs):
    values = [schedule(torch.tensor(base), torch.tensor(term)) for base, term in pairs]
    schedule.step()
    return [float(value) for value in values]


def test_the_ratio_makes_both_means_of_the_epoch_before_equal():
    schedule = HausdorffSchedule()
    assert epoch(schedule, [(0.9, 30.0), (0.7, 50.0)]) == pytest.approx([0.9, 0.7]), "nothing is known yet"
    assert float(schedule.weight) == pytest.approx(1.6 / 80)
    assert epoch(schedule, [(0.5, 10.0), (0.3, 0.0)]) == pytest.approx([0.5 + 0.02 * 10, 0.3])
    assert float(schedule.weight) == pytest.approx(0.8 / 10), "of the last epoch alone"


def test_the_linear_rule_reaches_its_weight_after_the_warm_up_and_stays():
    schedule = HausdorffSchedule("linear", weight=0.4, warm_up=4)
    weights = []
    for _ in range(6):
        weights.append(float(schedule.weight))
        schedule.step()
    assert weights == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4])
    assert float(HausdorffSchedule("linear", 0.4).weight) == pytest.approx(0.4)


def test_a_warm_up_ramps_the_ratio_and_a_weight_scales_it():
    schedule = HausdorffSchedule(weight=3.0, warm_up=2)
    epoch(schedule, [(1.0, 2.0)])
    assert float(schedule.weight) == pytest.approx(3 * 0.5 * 0.5)
    epoch(schedule, [(1.0, 2.0)])
    assert float(schedule.weight) == pytest.approx(3 * 0.5)


def test_terms_without_a_mean_leave_the_weight_and_negative_ones_count_by_size():
    schedule = HausdorffSchedule()
    epoch(schedule, [(1.0, 4.0)])
    for pairs in ([(1.0, 0.0)], []):
        epoch(schedule, pairs)
        assert float(schedule.weight) == 0.25
    epoch(schedule, [(1.0, -2.0)])
    assert float(schedule.weight) == 0.5


def test_steps_that_overflow_are_left_out_of_the_means():
    schedule = HausdorffSchedule()
    epoch(schedule, [(1.0, 2.0), (float("inf"), 2.0), (1.0, float("nan"))])
    assert float(schedule.weight) == 0.5


def test_validation_leaves_the_means_alone():
    schedule = HausdorffSchedule().eval()
    schedule(torch.tensor(1.0), torch.tensor(2.0))
    assert not schedule.sums.any()


def test_the_gradient_is_that_of_the_weighted_sum():
    schedule = HausdorffSchedule("linear", 0.25)
    base, term = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    schedule(base, term).backward()
    assert (float(base.grad), float(term.grad)) == (1.0, 0.25)


def test_a_checkpoint_in_the_middle_of_an_epoch_goes_on_as_if_nothing_had_been(tmp_path):
    first, other = HausdorffSchedule(warm_up=3), HausdorffSchedule(warm_up=3)
    epoch(first, [(1.0, 2.0)])
    first(torch.tensor(0.5), torch.tensor(7.0))
    torch.save(first.state_dict(), tmp_path / "schedule.pt")
    other.load_state_dict(torch.load(tmp_path / "schedule.pt", weights_only=True))
    for schedule in (first, other):
        epoch(schedule, [(0.25, 9.0)])
    assert first.state_dict().keys() == {"epoch", "weight", "sums"}
    for name, value in first.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_the_whole_training_step_compiles_in_one_graph_and_keeps_its_sums():
    torch._dynamo.reset()
    logits, target = torch.randn(1, 2, 6, 7), torch.randint(2, (1, 1, 6, 7))

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.schedule, self.hausdorff = HausdorffSchedule(), HausdorffDTLoss(to_onehot_y=True)

        def forward(self, logits, target):
            p = logits.softmax(1)
            return self.schedule(nn.functional.cross_entropy(logits, target[:, 0]), self.hausdorff(p, target))

    plain, compiled = Step(), Step()
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for _ in range(2):
            torch.testing.assert_close(step(logits, target), plain(logits, target))
        torch.testing.assert_close(compiled.schedule.sums, plain.schedule.sums)
        for module in (plain, compiled):
            module.schedule.step()
    torch.testing.assert_close(compiled.schedule.weight, plain.schedule.weight)
    assert plain.schedule.weight > 0


def _one_process(rank, port, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        schedule = HausdorffSchedule()
        # The second process sees a batch more: the mean is over batches, not over processes.
        pairs = [(1.0, 10.0)] if rank == 0 else [(3.0, 20.0), (2.0, 30.0)]
        epoch(schedule, pairs)
        torch.save(schedule.state_dict(), f"{path}.{rank}")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_weight_of_one_that_saw_it_all(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = str(tmp_path / "state")
    torch.multiprocessing.spawn(_one_process, (port, path), nprocs=2)
    alone = HausdorffSchedule()
    epoch(alone, [(1.0, 10.0), (3.0, 20.0), (2.0, 30.0)])
    for rank in range(2):
        state = torch.load(f"{path}.{rank}", weights_only=True)
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(state[name], value)


@pytest.mark.parametrize(
    ("call", "kind", "pattern"),
    [
        (lambda: HausdorffSchedule("cosine"), ValueError, "got 'cosine'"),
        (lambda: HausdorffSchedule(weight=0), ValueError, "positive and finite; got 0"),
        (lambda: HausdorffSchedule(warm_up=1.5), ValueError, "got 1.5"),
        (lambda: HausdorffSchedule()(torch.ones(2), torch.ones(())), ValueError, r"shape \(2,\)"),
        (lambda: HausdorffSchedule()(1.0, torch.ones(())), TypeError, "got float"),
    ],
)
def test_bad_arguments_are_one_clear_line(call, kind, pattern):
    with pytest.raises(kind, match=pattern) as error:
        call()
    one_line(error)
