"""NaN and Inf in the input, the loss or a gradient, under each policy: what is kept, what is said, what goes on.

Each run is 3 epochs of 6 steps. What `skip` and `rollback` must end in is computed a second time by hand, in
a plain loop without trainer, guard or policy. The 18 of the issue are all cases of
`test_a_value_that_is_not_finite`: those marked `faults` and the three `make test` runs as well.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import re

import pytest
from conftest import EIGHTEEN, build, vit_train_forked, whole_state
from torch import nn

from vit_train.checkpoint import checkpoint_directories, load, resolve_link
from vit_train.data.transforms.batch_transforms import Augment
from vit_train.rng import seed_device
from vit_train.training.objective import CrossEntropy

slow = pytest.mark.faults
BAD = 9  # in the middle of the second epoch; the last due checkpoint is that of step 6
SMALL = (*EIGHTEEN, "tracker.log_every_steps=3")  # so that step 9 is a line of metrics.jsonl
HYBRID = (*SMALL, "model=hybrid_cifar", "model.embed_dim=16", "model.num_heads=2", "model.depth=1")


# -------------------------------------------------------------------------------------------------- the poison
class Poison(Augment):
    """Spoils one pixel of one image in the batches of some steps, or asks the objective below to spoil more."""

    def __init__(
        self,
        mean,
        std,
        *,
        seed: int,
        num_classes: int,
        max_shift: float,
        crop_scale: None,
        crop_ratio: tuple[float, float],
        hflip_prob: float,
        erase_prob: float,
        mixup_alpha: float,
        cutmix_alpha: float,
        mix_prob: float,
        mix_switch_prob: float,
        mix_off_epoch: None,
        kind: str,
        value: str,
        at: list[int],
    ) -> None:
        super().__init__(mean, std, seed=seed, num_classes=num_classes, max_shift=max_shift)
        self.kind, self.value, self.at = kind, float(value), at

    def forward(self, batch, epoch, step):
        images, targets = super().forward(batch, epoch, step)
        Poisoned.kind = self.kind if step + 1 in self.at else ""
        Poisoned.value, Poisoned.micro_batch = self.value, 0
        if Poisoned.kind == "input":
            images[-1, 0, 3, 3] = self.value
        return images, targets


class Poisoned(CrossEntropy):
    """Cross entropy whose second micro-batch has the loss, or one number of one gradient, spoiled."""

    kind, value, micro_batch = "", 0.0, 0
    hooked = None

    def forward(self, model, images, targets):
        loss, logits = super().forward(model, images, targets)
        Poisoned.micro_batch += 1
        if self.hooked is None:
            self.hooked = next(model.parameters()).register_hook(self.spoil)
        second = Poisoned.micro_batch == 2
        return (loss * self.value if second and self.kind == "loss" else loss), logits

    def spoil(self, gradient):
        if self.kind == "gradient" and Poisoned.micro_batch == 2:
            gradient = gradient.clone()
            gradient.view(-1)[0] = self.value
        return gradient


def poisoned(policy, kind="loss", value="nan", at=(BAD,), settings=SMALL):
    """The command."""
    return (
        *settings,
        f"trainer.on_nonfinite={policy}",
        "objective._target_=test_nonfinite.Poisoned",
        "augment.batch._target_=test_nonfinite.Poison",
        f"+augment.batch.kind={kind}",
        f"+augment.batch.value='{value}'",
        f"+augment.batch.at={list(at)}".replace(" ", ""),
    )


# --------------------------------------------------------------------------------------------- what must happen
def by_hand(settings, *, left_out, back_to=None):
    """SHA-256 of every tensor after the 18 steps of a plain loop.

    Args:
        settings: of the run.
        left_out: steps, from 1, whose update is not made.
        back_to: where given, the number of updates after which the state is kept that comes back then.
    """
    trainer = build(*settings, "run_dir=never_made").trainer
    model, ema, optimizer = trainer.model, trainer.ema, trainer.optimizer
    parts, device, schedule = trainer.parts, trainer.strategy.device, trainer.schedule
    base = optimizer.param_groups[0]["lr"]
    shift = {"seed": 0, "num_classes": 10, "max_shift": 0.125}
    augment = Augment(parts.data.mean, parts.data.std, **shift)

    def state():
        return copy.deepcopy((model.state_dict(), ema.module.state_dict(), optimizer.state_dict()))

    kept = state()
    for step in range(18):
        if step == back_to:
            kept = state()
        if step % 6 == 0:
            trainer.train_loader.set_position(step // 6, 0)
            batches = iter(trainer.train_loader)
        batch = next(batches)
        if step + 1 in left_out:
            if back_to is not None:
                for part, values in zip((model, ema.module, optimizer), copy.deepcopy(kept)):
                    part.load_state_dict(values)
            continue
        for group in optimizer.param_groups:
            group["lr"] = base * schedule(step)
        images, targets = augment(batch, step // 6, step)
        for i, (x, y) in enumerate(zip(images.tensor_split(2), targets.tensor_split(2))):
            seed_device(device, 0, "step", step, i, 0)
            loss, _ = trainer.objective(model, x, y)
            (loss * (len(x) / len(images))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model, step)
        optimizer.zero_grad()
    tensors = trainer.strategy.snapshot(model, ema, optimizer)
    return {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in tensors.items()}


def hashes(path):
    """Of the tensors of one checkpoint."""
    return {n: hashlib.sha256(t.numpy().tobytes()).hexdigest() for n, t in load(path).tensors.items()}


def last(run_dir):
    return resolve_link(run_dir / "checkpoints" / "last")


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def assert_all_finite(run_dir):
    """No number of any file of a run is NaN or infinite."""
    for path in checkpoint_directories(run_dir / "checkpoints"):
        checkpoint = load(path)
        bad = [name for name, tensor in checkpoint.tensors.items() if not tensor.isfinite().all()]
        assert bad == [], path
        json.loads((path / "state.json").read_text(), parse_constant=refuse)
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def words(text):
    """Without the line breaks of a console."""
    return " ".join(text.split())


@pytest.fixture(scope="module")
def once(warm, tmp_path_factory):
    """Runs a command, or computes by hand, once for each set of arguments."""

    @functools.cache
    def finished(*settings):
        folder = tmp_path_factory.mktemp("once")
        vit_train_forked(*settings, cwd=folder)
        return folder / "run"

    finished.by_hand = functools.cache(by_hand)
    return finished


def files_of_batch(step):
    """The first samples of the batch of a step, from 1."""
    trainer = build(*SMALL, "run_dir=never_made").trainer
    trainer.train_loader.set_position(*divmod(step - 1, 6))
    index = next(iter(trainer.train_loader)).index.tolist()
    return ", ".join(trainer.parts.data.source("train", i) for i in index[:3])


# --------------------------------------------------------------------------------------------------- 18 of 18
SAMPLE = {("nan", "loss", "abort"), ("nan", "input", "skip"), ("inf", "gradient", "rollback")}


@pytest.mark.parametrize(
    ("value", "kind", "policy"),
    [
        pytest.param(*case, marks=() if case in SAMPLE else slow)
        for value in ("nan", "inf")
        for kind in ("input", "loss", "gradient")
        for policy in ("abort", "skip", "rollback")
        for case in [(value, kind, policy)]
    ],
)
def test_a_value_that_is_not_finite(once, tmp_path, value, kind, policy) -> None:
    """The step before is made, the step itself is not, and no file ever holds the value."""
    done = vit_train_forked(*poisoned(policy, kind, value), cwd=tmp_path, check=False)
    run = tmp_path / "run"
    said = words(done.err if policy == "abort" else done.out)
    seen = {"input": "the loss is nan", "loss": f"the loss is {value}"}.get(
        kind, f"the gradient norm is {value}"
    )
    assert f"{seen} at step {BAD}; the update was not made" in said
    assert f"The batch held {files_of_batch(BAD)} and 13 more" in said
    assert_all_finite(run)
    if policy == "abort":
        assert (done.code, done.err.count("\n")) == (6, 1), done
        assert done.err.startswith("vit-train: error: ")
        assert last(run).name == "step_00000006"
        assert hashes(last(run)) == hashes(last(once(*SMALL, "trainer.stop_at_step=6")))
        assert [p.name for p in checkpoint_directories(run / "checkpoints")] == ["step_00000006"]
        return
    assert (done.code, done.err) == (0, "")
    back_to = 6 if policy == "rollback" else None
    assert hashes(last(run)) == once.by_hand(SMALL, left_out=(BAD,), back_to=back_to)
    assert json.loads((run / "result.json").read_text())["steps"] == 18
    if policy == "rollback":
        assert "goes on with the next step and the weights of step_00000006" in said


def test_the_same_run_without_poison_is_the_usual_one(once, eighteen, tmp_path) -> None:
    """The control: poison that never acts changes nothing, and the loop by hand is that of the trainer."""
    vit_train_forked(*poisoned("skip", at=()), cwd=tmp_path)
    assert whole_state(tmp_path / "run") == eighteen
    assert hashes(last(tmp_path / "run")) == once.by_hand(SMALL, left_out=())
    assert once.by_hand(SMALL, left_out=()) != once.by_hand(SMALL, left_out=(BAD,))


# --------------------------------------------------------------------------------------------- how often at most
@slow
@pytest.mark.parametrize(("bad", "code"), [(range(3, 12), 0), (range(3, 13), 6)], ids=["9 steps", "10 steps"])
def test_skip_gives_up_after_ten_in_a_row(once, tmp_path, bad, code) -> None:
    done = vit_train_forked(*poisoned("skip", at=bad), cwd=tmp_path, check=False)
    assert done.code == code, done
    assert done.out.count("the run goes on with") == 9
    assert_all_finite(tmp_path / "run")
    if code == 0:
        assert hashes(last(tmp_path / "run")) == once.by_hand(SMALL, left_out=tuple(bad))
    else:
        assert done.err.count("\n") == 1
        assert "at step 12; the update was not made. 10 steps in a row were left out" in done.err


@slow
def test_a_good_step_starts_the_count_anew(once, tmp_path) -> None:
    bad = (*range(2, 9), *range(10, 17))
    vit_train_forked(*poisoned("skip", at=bad), cwd=tmp_path)
    assert hashes(last(tmp_path / "run")) == once.by_hand(SMALL, left_out=bad)


@slow
@pytest.mark.parametrize(("bad", "code"), [((8, 11), 0), ((8, 11, 14), 6)], ids=["twice", "three times"])
def test_rollback_goes_back_at_most_twice(once, tmp_path, bad, code) -> None:
    done = vit_train_forked(*poisoned("rollback", at=bad), cwd=tmp_path, check=False)
    assert done.code == code, done
    assert words(done.out).count("the weights of step_00000006") == 2
    assert_all_finite(tmp_path / "run")
    if code == 0:
        assert hashes(last(tmp_path / "run")) == once.by_hand(SMALL, left_out=bad, back_to=6)
    else:
        assert done.err.count("\n") == 1
        assert "at step 14; the update was not made. The run has already gone back 2 times" in done.err


@slow
def test_rollback_before_the_first_due_checkpoint_goes_to_the_start(once, tmp_path) -> None:
    done = vit_train_forked(*poisoned("rollback", at=(4,)), cwd=tmp_path)
    assert "the weights of step_00000000" in words(done.out)
    assert hashes(last(tmp_path / "run")) == once.by_hand(SMALL, left_out=(4,), back_to=0)


@slow
def test_after_a_rollback_the_weights_are_those_of_the_checkpoint(warm, tmp_path) -> None:
    vit_train_forked(*poisoned("rollback"), f"trainer.stop_at_step={BAD}", cwd=tmp_path)
    root = tmp_path / "run" / "checkpoints"
    assert last(tmp_path / "run").name == "step_00000009"
    assert hashes(root / "step_00000009") == hashes(root / "step_00000006")


# ------------------------------------------------------------------------------------------------- interrupted
@slow
@pytest.mark.parametrize("stop", [5, 6, 7, 8, 9, 10, 13])
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_interrupted_around_a_bad_step_equals_uninterrupted(once, tmp_path, policy, stop) -> None:
    """Also where the interruption saved a later state than the one a rollback goes to."""
    command = poisoned(policy)
    vit_train_forked(*command, f"trainer.stop_at_step={stop}", cwd=tmp_path)
    vit_train_forked(*command, cwd=tmp_path)
    assert whole_state(tmp_path / "run") == whole_state(once(*command))
    if policy == "rollback":
        assert load(last(tmp_path / "run")).state["train"]["rollbacks"] == 1


@slow
def test_interruptions_do_not_push_out_the_checkpoint_a_rollback_goes_to(once, tmp_path) -> None:
    """Two are kept, and each interruption saves one."""
    # evaluated at the end only: the checkpoint is not kept for being the best one as well
    command = (*poisoned("rollback", at=(11,)), "trainer.eval_every_epochs=3")
    for stop in (7, 8, 9):
        vit_train_forked(*command, f"trainer.stop_at_step={stop}", cwd=tmp_path)
    saved = [path.name[-2:] for path in checkpoint_directories(tmp_path / "run" / "checkpoints")]
    assert saved == ["09", "08", "06"]
    vit_train_forked(*command, cwd=tmp_path)
    assert whole_state(tmp_path / "run") == whole_state(once(*command))


@slow
@pytest.mark.parametrize(("policy", "bad"), [("skip", range(3, 13)), ("rollback", (8, 11, 14))])
def test_an_interruption_does_not_start_the_counts_anew(warm, tmp_path, policy, bad) -> None:
    command = poisoned(policy, at=bad)
    vit_train_forked(*command, "trainer.stop_at_step=9", cwd=tmp_path)
    vit_train_forked(*command, "trainer.stop_at_step=11", cwd=tmp_path)
    done = vit_train_forked(*command, cwd=tmp_path, check=False)
    assert done.code == 6, done
    assert f"at step {bad[-1]}; the update was not made" in done.err


@slow
def test_the_policy_may_change_with_the_continuation(once, tmp_path) -> None:
    """What a user does whose run was aborted."""
    done = vit_train_forked(*poisoned("abort"), cwd=tmp_path, check=False)
    assert done.code == 6
    vit_train_forked(*poisoned("skip"), cwd=tmp_path)
    assert hashes(last(tmp_path / "run")) == once.by_hand(SMALL, left_out=(BAD,))


# ------------------------------------------------------------------------------------------- running statistics
@slow
@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_running_statistics_do_not_remember_a_bad_step(once, tmp_path, policy, value) -> None:
    """BatchNorm's buffers are changed by the forward pass, before anyone knows that the loss is NaN."""
    vit_train_forked(*poisoned(policy, "input", value, settings=HYBRID), cwd=tmp_path)
    assert_all_finite(tmp_path / "run")
    after = hashes(last(tmp_path / "run"))
    assert "model/patch_embed.trunk.groups.0.norm1.running_var" in after
    assert after == once.by_hand(HYBRID, left_out=(BAD,), back_to=6 if policy == "rollback" else None)


# ----------------------------------------------------------------------------------- weights beyond the range
@slow
@pytest.mark.parametrize("policy", ["abort", "skip", "rollback"])
def test_weights_that_a_finite_gradient_made_infinite_are_never_saved(once, tmp_path, policy) -> None:
    """A rate above the largest float: loss and gradient of step 1 are finite, what they lead to is not."""
    command = (*SMALL, "optimizer.lr=1e39", "schedule=constant", "trainer.save_every_steps=1")
    done = vit_train_forked(*command, f"trainer.on_nonfinite={policy}", cwd=tmp_path, check=False)
    assert (done.code, done.err.count("\n")) == (6, 1), done
    assert "a weight, an average or an optimizer slot is not finite after step" in done.err
    assert_all_finite(tmp_path / "run")
    saved = checkpoint_directories(tmp_path / "run" / "checkpoints")
    assert re.search(r"after step (\d)", done.err)[1] == ("3" if policy == "rollback" else "1")
    assert [path.name for path in saved] == (
        ["step_00000002", "step_00000001"] if policy == "rollback" else []
    )
    for path in saved:  # what is saved instead are the weights it went back to
        assert hashes(path) == hashes(last(once(*SMALL, "trainer.stop_after_minutes=0")))


# ----------------------------------------------------------------------------------------------- in validation
class Overwhelmed(CrossEntropy):
    """A validation loss that is not finite, in every evaluation."""

    def per_sample(self, logits, targets):
        return super().per_sample(logits, targets) * float("inf")


@slow
def test_a_validation_loss_that_is_not_finite_costs_no_run(warm, tmp_path) -> None:
    """It is a figure, not a weight: the run goes on, and can be continued."""
    command = (*SMALL, "objective._target_=test_nonfinite.Overwhelmed")
    for folder, stops in (("whole", ()), ("parts", (6, 8, 12))):
        (tmp_path / folder).mkdir()
        for stop in stops:
            vit_train_forked(*command, f"trainer.stop_at_step={stop}", cwd=tmp_path / folder)
        vit_train_forked(*command, cwd=tmp_path / folder)
    whole, parts = (whole_state(tmp_path / folder / "run") for folder in ("whole", "parts"))
    assert parts == whole
    for line in (tmp_path / "whole/run/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
