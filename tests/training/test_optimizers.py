"""Parameter groups, schedules against torch's own, optimizer state by name."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from vit_train.training.optimizers import (
    adam,
    adamw,
    decay_groups,
    load_named_state,
    muon,
    named_state,
    set_lr,
    sgd,
)
from vit_train.training.schedules import Constant, Cosine, MultiStep, ReduceOnPlateau


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, 3))
        self.linear = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x + self.pos_embed)).sum()


def test_only_matrices_decay() -> None:
    model = Small()
    groups = decay_groups(model, 0.1, lr=1.0)
    names = {id(p): n for n, p in model.named_parameters()}
    assert [names[id(p)] for p in groups[0]["params"]] == ["linear.weight"]
    assert {names[id(p)] for p in groups[1]["params"]} == {
        "pos_embed",
        "linear.bias",
        "norm.weight",
        "norm.bias",
    }
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]


def test_frozen_parameters_belong_to_no_group() -> None:
    model = Small()
    model.linear.weight.requires_grad_(False)
    assert len(decay_groups(model, 0.1, lr=1.0)) == 1


def test_biases_of_batch_norms_learn_at_a_rate_of_their_own() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.LayerNorm(4), nn.Linear(4, 2))
    groups = sgd(model, lr=0.5, weight_decay=0.1, norm_bias_factor=64.0).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found == {
        "0.weight": (0.5, 0.1),
        "0.bias": (0.5, 0.0),
        "1.weight": (0.5, 0.0),
        "1.bias": (32.0, 0.0),
        "2.weight": (0.5, 0.0),
        "2.bias": (0.5, 0.0),
        "3.weight": (0.5, 0.1),
        "3.bias": (0.5, 0.0),
    }
    assert groups[0]["lr"] == 0.5, "the rate of the first group is the one that is logged"


def test_cosine_warms_up_peaks_and_ends_at_its_final_factor() -> None:
    schedule = Cosine(10, 100, warmup_epochs=1, final_factor=0.01)
    values = [schedule(step) for step in range(100)]
    assert 0 < values[0] < 0.1 + 1e-9
    assert values[10] == pytest.approx(1.0)
    assert max(values) == pytest.approx(1.0)
    assert values[-1] == pytest.approx(0.01)
    assert all(a <= b for a, b in itertools.pairwise(values[:11]))
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))


@pytest.mark.parametrize("kind", [Cosine, MultiStep])
def test_warmup_is_as_long_as_typed(kind) -> None:
    assert kind(10, 20, warmup_epochs=1.5).warmup_steps == 15
    assert kind(10, 20, warmup_epochs=2).warmup_steps == 20
    assert kind(10, 20, warmup_epochs=0).warmup_steps == 0
    words = r"warmup_epochs=2\.1 \(21 steps\) is longer than the run of 20 steps; type fewer, or schedule.warmup_epochs=null"
    with pytest.raises(ValueError, match=words):
        kind(10, 20, warmup_epochs=2.1)


@pytest.mark.parametrize("kind", [Cosine, MultiStep])
@pytest.mark.parametrize(("total", "steps"), [(3, 0), (5, 1), (49, 9), (100, 20), (300, 20)])
def test_warmup_that_is_not_typed_is_two_epochs_and_at_most_a_fifth(kind, total, steps) -> None:
    assert kind(10, total, warmup_epochs=None).warmup_steps == steps


def test_multistep_falls_at_its_fractions() -> None:
    schedule = MultiStep(10, 100, milestones=(0.5, 0.8), factor=0.1, warmup_epochs=0)
    values = [schedule(s) for s in (0, 49, 50, 79, 80, 99)]
    assert values == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize(("factor", "patience", "mode"), [(0.94, 1, "min"), (0.5, 5, "min"), (0.5, 0, "max")])
def test_plateau_decides_as_torch_does(factor: float, patience: int, mode: str) -> None:
    ours = ReduceOnPlateau(
        1, 1, monitor="train/loss", mode=mode, factor=factor, patience=patience, min_factor=0.01
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode=mode, factor=factor, patience=patience, min_lr=0.01, eps=0.0
    )
    generator = torch.Generator().manual_seed(0)
    for epoch in range(200):
        loss = 2.0 / (1 + epoch // 7) + 0.3 * float(torch.rand((), generator=generator))
        ours.observe({"train/loss": loss})
        theirs.step(loss)
        assert ours(epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
    assert ours(0) < 0.2, "the case never reduced: it compares nothing"


def test_plateau_remembers() -> None:
    first = ReduceOnPlateau(1, 1, patience=1)
    for value in (1.0, 1.0, 1.0):
        first.observe({"val/loss": value})
    second = ReduceOnPlateau(1, 1, patience=1)
    second.load_state_dict(first.state_dict())
    for value in (1.0, 1.0, 1.0):
        first.observe({"val/loss": value})
        second.observe({"val/loss": value})
        assert first(0) == second(0)
    assert first(0) == 0.25


def test_constant_is_constant() -> None:
    assert {Constant(3, 9)(step) for step in range(9)} == {1.0}


def test_the_multiplier_is_of_the_base_rate_however_often_it_is_set() -> None:
    optimizer = adamw(Small(), lr=0.5)
    for multiplier in (0.1, 1.0, 0.2):
        set_lr(optimizer, multiplier)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.5 * multiplier] * 2)


@pytest.mark.parametrize("factory", [adamw, adam, sgd, muon])
def test_optimizer_state_by_name_continues_bit_for_bit(factory) -> None:
    def steps(model: Small, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.ones(2, 4, 3)).backward()
            optimizer.step()

    torch.manual_seed(0)
    unbroken = Small()
    start = {k: v.clone() for k, v in unbroken.state_dict().items()}
    whole = factory(unbroken, lr=0.1)
    steps(unbroken, whole, 6)

    first = Small()
    first.load_state_dict(start)
    optimizer = factory(first, lr=0.1)
    steps(first, optimizer, 3)
    saved = {k: v.clone() for k, v in named_state(first, optimizer).items()}
    assert all(key.split("/")[0] in dict(first.named_parameters()) for key in saved)
    second = Small()
    second.load_state_dict(first.state_dict())
    continued = factory(second, lr=0.1)
    load_named_state(second, continued, saved)
    steps(second, continued, 3)
    assert all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), second.parameters()))

    forgetful = Small()
    forgetful.load_state_dict(first.state_dict())
    steps(forgetful, factory(forgetful, lr=0.1), 3)
    assert not all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), forgetful.parameters()))


def test_optimizer_state_of_another_model_is_refused() -> None:
    model = Small()
    with pytest.raises(ValueError, match="belongs to no parameter"):
        load_named_state(model, adamw(model, lr=0.1), {"other.weight/exp_avg": torch.zeros(1)})
    with pytest.raises(ValueError, match="has shape"):
        load_named_state(model, adamw(model, lr=0.1), {"linear.weight/exp_avg": torch.zeros(5, 5)})
