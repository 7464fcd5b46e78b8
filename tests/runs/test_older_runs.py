"""A run from before vit-train had packages is evaluated, and goes on, as if nothing had moved."""

from __future__ import annotations

import json

import pytest
import yaml
from conftest import TINY, change_states, checkpoint_hashes, typed_here, vit_train_here

from vit_train.cli import evaluate

# As the configurations of commit a5e88f9 name them
BEFORE = {
    "vit_train.data.transforms.batch_transforms": "vit_train.data.batch_transforms",
    "vit_train.data.transforms.sample_transforms": "vit_train.data.sample_transforms",
    "vit_train.training.objective": "vit_train.objective",
    "vit_train.training.optimizers": "vit_train.optim",
    "vit_train.training.schedules": "vit_train.optim",
    "vit_train.training.strategy": "vit_train.strategy",
    "vit_train.training.trainer": "vit_train.trainer",
    "vit_train.report.tracker": "vit_train.tracker",
}
SETTINGS = (*TINY, "augment=medium")
SCHEDULES = ("cosine", "multistep", "plateau", "constant")


def as_before(node):
    if isinstance(node, dict):
        return {key: as_before(value) for key, value in node.items()}
    if isinstance(node, str) and node.rpartition(".")[0] in BEFORE:
        module, _, name = node.rpartition(".")
        return f"{BEFORE[module]}.{name}"
    return node


def make_older(run):
    config = as_before(yaml.safe_load((run / "config.yaml").read_text()))
    targets = json.dumps(config)
    for module in BEFORE.values():
        assert f'"{module}.' in targets
    for module in BEFORE:
        assert module not in targets
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    change_states(run, lambda state: state.update(config=config))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_it_goes_on_bit_for_bit(in_tmp, schedule):
    settings = (*SETTINGS, f"schedule={schedule}")
    for name, stop in (("whole", ()), ("parts", ("trainer.stop_at_step=7",))):
        done = vit_train_here(*settings, f"run_dir={name}", *stop, cwd=in_tmp)
        assert done.code == 0, done
    make_older(in_tmp / "parts")
    again = ("resume=parts",) if schedule != "multistep" else (*settings, "run_dir=parts")
    done = vit_train_here(*again, cwd=in_tmp)
    assert done.code == 0, done
    assert checkpoint_hashes(in_tmp / "parts") == checkpoint_hashes(in_tmp / "whole")


def test_a_finished_one_is_finished_and_evaluated_as_ever(in_tmp):
    vit_train_here(*SETTINGS, "run_dir=run", cwd=in_tmp)
    now = typed_here(evaluate.main, "run", "--json", "now.json", cwd=in_tmp)
    make_older(in_tmp / "run")
    then = typed_here(evaluate.main, "run", "--json", "then.json", cwd=in_tmp)
    assert (now.code, then.code) == (0, 0), then
    figures = [json.loads((in_tmp / name).read_text()) for name in ("now.json", "then.json")]
    assert figures[0]["top1"] == figures[1]["top1"]
    assert figures[0]["loss"] == figures[1]["loss"]
    for typed in (["resume=run"], [*SETTINGS, "run_dir=run"]):
        done = vit_train_here(*typed, cwd=in_tmp)
        assert (done.code, "run is finished: nothing to do" in done.out) == (0, True), done
