"""A run from before vit-train had packages is evaluated as ever, and not continued."""

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
COMMIT = "a5e88f926f04423c2f8ae2b262805572e8c68574"


def as_before(node):
    if isinstance(node, dict):
        return {key: as_before(value) for key, value in node.items()}
    if isinstance(node, str) and node.rpartition(".")[0] in BEFORE:
        module, _, name = node.rpartition(".")
        return f"{BEFORE[module]}.{name}"
    return node


@pytest.fixture
def older(in_tmp):
    """A run, its evaluation by this version, and then the names it would have had before."""
    vit_train_here(*TINY, "run_dir=run", "augment=shift", cwd=in_tmp)
    run = in_tmp / "run"
    figures = typed_here(evaluate.main, "run", "--json", "now.json", cwd=in_tmp)
    assert figures.code == 0, figures
    config = as_before(yaml.safe_load((run / "config.yaml").read_text()))
    assert config["trainer"]["_target_"] == "vit_train.trainer.Trainer"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    change_states(run, lambda state: state.update(config=config))
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "git": {"sha": COMMIT, "dirty": False}}))
    return run


def test_it_is_evaluated_as_ever(older, in_tmp):
    done = typed_here(evaluate.main, "run", "--json", "then.json", cwd=in_tmp)
    assert done.code == 0, done
    now, then = (json.loads((in_tmp / name).read_text()) for name in ("now.json", "then.json"))
    assert then["top1"] == now["top1"]
    assert then["loss"] == now["loss"]


@pytest.mark.parametrize("typed", [["resume=run"], ["resume=run/checkpoints/last"], [*TINY, "run_dir=run"]])
def test_it_is_not_continued(older, in_tmp, typed):
    before = checkpoint_hashes(older)
    done = vit_train_here(*typed, "trainer.epochs=9", cwd=in_tmp)
    assert (done.code, done.err.count("\n")) == (4, 1), done
    for words in ("run was begun by an older vit-train", COMMIT, "init_from=run"):
        assert words in done.err
    assert checkpoint_hashes(older) == before


def test_a_commit_that_is_none_is_not_repeated(older, in_tmp):
    facts = json.loads((older / "run.json").read_text())
    (older / "run.json").write_text(json.dumps({**facts, "git": {"sha": "\x1b[31m"}}))
    done = vit_train_here("resume=run", cwd=in_tmp)
    assert (done.code, "\x1b" in done.err, "older vit-train, which" in done.err) == (4, False, True), done
