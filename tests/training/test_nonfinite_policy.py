"""The policy by itself: what counts, what is put back, what is looked at; whole runs are in tests/faults."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from vit_train.checkpoint import Checkpointer, Snapshot
from vit_train.checkpoint.saver import Saver
from vit_train.data import Batch
from vit_train.errors import CheckpointError, NonFiniteError
from vit_train.training.ema import Ema
from vit_train.training.nonfinite import MAX_SCALED_IN_A_ROW, NonFinite
from vit_train.training.state import TrainState
from vit_train.training.strategy import SingleDevice


class Net(nn.Module):
    """A matrix, two kinds of running statistics, an integer buffer and an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.nested = nn.Sequential(nn.BatchNorm1d(3, affine=False))
        self.register_buffer("index", torch.arange(4))
        self.register_buffer("nothing", torch.zeros(0))

    def forward(self, x):
        return self.nested(self.norm(self.lin(x)))


def batch(images=5):
    zeros = torch.zeros(images, dtype=torch.int64)
    return Batch(torch.zeros(images, 1, 2, 2, dtype=torch.uint8), zeros, torch.arange(images) + 10, zeros)


class Setup:
    """A policy with everything it protects, after one good step whose checkpoint is step_00000001."""

    def __init__(self, tmp_path, policy) -> None:
        torch.manual_seed(0)
        self.model = Net()
        self.ema = Ema(self.model, decay=0.5)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.said = []
        self.strategy = SingleDevice(device="cpu")
        self.saver = Saver(Checkpointer(tmp_path), background=False, say=self.said.append)
        self.policy = NonFinite(
            policy,
            self.strategy,
            self.model,
            self.ema,
            self.optimizer,
            self.saver,
            lambda split, index: f"{split} image {index}",
        )
        self.state = TrainState(step=1, anchor=1)
        self.step()
        self.saver.save(Snapshot(self.tensors(), {"train": {}}, 1, False, 2, [1]))

    def step(self):
        self.model(torch.randn(8, 3)).pow(2).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.model, 0)

    def tensors(self):
        return self.strategy.snapshot(self.model, self.ema, self.optimizer)

    def bad(self, *, loss=math.nan, norm=1.0, images=5, scaling=False):
        self.policy.bad_step(self.state, batch(images), loss, norm, scaling=scaling)


def same(first, second):
    return [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.fixture
def made(tmp_path):
    return lambda policy: Setup(tmp_path, policy)


# --------------------------------------------------------------------------------------------------- what is said
@pytest.mark.parametrize(
    ("figures", "what"),
    [
        ({"loss": math.nan}, "the loss is nan at step 2; the update was not made"),
        ({"loss": -math.inf, "norm": math.nan}, "the loss is -inf at step 2; the update was not made"),
        ({"loss": 1.0, "norm": math.inf}, "the gradient norm is inf at step 2; the update was not made"),
        ({"loss": 1.0, "norm": math.nan}, "the gradient norm is nan at step 2; the update was not made"),
    ],
)
def test_the_line_names_the_value_the_step_and_what_to_type(made, figures, what) -> None:
    with pytest.raises(NonFiniteError) as caught:
        made("abort").bad(**figures)
    assert str(caught.value) == (
        f"{what}. Try a lower optimizer.lr, trainer.grad_clip_norm=1 or trainer.precision=fp32."
        " The batch held train image 10, train image 11, train image 12 and 2 more"
    )
    assert caught.value.exit_code == 6


@pytest.mark.parametrize(
    ("images", "named"), [(1, "train image 10"), (3, "train image 10, train image 11, train image 12")]
)
def test_a_small_batch_is_named_whole(made, images, named) -> None:
    with pytest.raises(NonFiniteError, match=f"The batch held {named}$"):
        made("abort").bad(images=images)


# ------------------------------------------------------------------------------------------------- what is counted
def test_loss_scaling_looks_for_its_scale_in_silence(made) -> None:
    it = made("abort")
    for _ in range(MAX_SCALED_IN_A_ROW):
        it.bad(loss=1.0, norm=math.inf, scaling=True)
    it.policy.good_step(it.state)
    assert it.state.scaled_in_a_row == 0
    for _ in range(MAX_SCALED_IN_A_ROW):
        it.bad(loss=1.0, norm=math.inf, scaling=True)
    assert it.said == []
    with pytest.raises(NonFiniteError, match="the gradient norm is inf at step 2"):
        it.bad(loss=1.0, norm=math.inf, scaling=True)


def test_steps_that_scaling_left_out_are_not_those_of_skip(made) -> None:
    it = made("skip")
    it.bad()
    it.bad(loss=1.0, norm=math.inf, scaling=True)
    assert (it.state.nonfinite_in_a_row, it.state.scaled_in_a_row) == (1, 1)
    it.policy.good_step(it.state)
    assert (it.state.nonfinite_in_a_row, it.state.scaled_in_a_row) == (0, 0)


def test_a_good_step_does_not_give_rollbacks_back(made) -> None:
    """Twice in a run, not twice in a row: it comes back to the same place each time."""
    it = made("rollback")
    for _ in range(2):
        it.bad()
        it.policy.good_step(it.state)
    assert it.state.rollbacks == 2
    with pytest.raises(
        NonFiniteError, match=r"has already gone back 2 times \(trainer.on_nonfinite=rollback\)"
    ):
        it.bad()


# ----------------------------------------------------------------------------------------------- what is put back
@pytest.mark.parametrize("policy", ["abort", "skip", "rollback"])
def test_running_statistics_are_put_back(made, policy) -> None:
    it = made(policy)
    before = it.tensors()
    it.policy.before_step()
    it.model(torch.full((4, 3), math.nan))
    it.model(torch.randn(4, 3))  # a second micro-batch
    changed = {name for name, tensor in it.tensors().items() if not torch.equal(tensor, before[name])}
    assert changed == {
        f"model/{norm}.{name}"
        for norm in ("norm", "nested.0")
        for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    if policy == "abort":
        with pytest.raises(NonFiniteError):
            it.bad()
    else:
        it.bad()
    assert same(before, it.tensors())


def test_a_rollback_brings_weights_average_slots_and_statistics_back(made) -> None:
    it = made("rollback")
    then = it.tensors()
    it.step()
    now = it.tensors()
    assert not any(
        same({name: then[name]}, now) for name in then if "index" not in name and then[name].numel()
    )
    it.state.step = 2
    it.policy.before_step()
    it.bad()
    assert same(then, it.tensors())
    assert (it.state.step, it.state.rollbacks) == (2, 1)  # it goes on with the next step
    assert "the run goes on with the next step and the weights of step_00000001. The batch held" in it.said[0]


def test_a_rollback_without_any_checkpoint_left_ends_the_run(made, tmp_path) -> None:
    it = made("rollback")
    (tmp_path / "checkpoints/step_00000001/manifest.json").unlink()
    with pytest.raises(CheckpointError, match="step_00000001"):
        it.bad()


# -------------------------------------------------------------------------------------- what is looked at
def places(it):
    slots = it.optimizer.state[it.model.lin.weight]
    return {
        "parameter": it.model.lin.weight,
        "buffer": it.model.norm.running_var,
        "average": it.ema.module.lin.bias,
        "buffer of the average": it.ema.module.norm.running_mean,
        "slot": slots["exp_avg_sq"],
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["parameter", "buffer", "average", "buffer of the average", "slot"])
def test_nothing_infinite_is_saved_from_wherever_it_is(made, place, value) -> None:
    it = made("skip")
    it.policy.check(it.state)
    with torch.no_grad():
        places(it)[place].view(-1)[-1] = value
    with pytest.raises(NonFiniteError, match="is not finite after step 1; it was not saved"):
        it.policy.check(it.state)


def test_large_is_not_infinite(made) -> None:
    """A Euclidean norm of these would be infinite."""
    it = made("abort")
    with torch.no_grad():
        for tensor in places(it).values():
            tensor.fill_(3e38)
    it.policy.check(it.state)


def test_before_the_first_step_and_without_an_average_there_is_less_to_look_at(tmp_path) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saver = Saver(Checkpointer(tmp_path), background=False, say=print)
    NonFinite("abort", SingleDevice(device="cpu"), model, None, optimizer, saver, str).check(TrainState())


def test_a_weight_beyond_the_range_goes_back_under_rollback(made) -> None:
    it = made("rollback")
    then = copy.deepcopy(it.tensors())
    with torch.no_grad():
        it.model.lin.weight.fill_(math.inf)
    it.policy.check(it.state)
    assert same(then, it.tensors())
    assert it.state.rollbacks == 1
