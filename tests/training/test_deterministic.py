"""trainer.deterministic: an operator without a deterministic implementation ends the run with its name."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY, vit_train_forked, whole_state

from vit_train.training.objective import CrossEntropy

ONE = (*TINY, "trainer.epochs=1")
PUTS = (*TINY, "trainer.epochs=1", "objective._target_=test_deterministic.Puts")


class Puts(CrossEntropy):
    """Uses `Tensor.put_`, for which torch documents no deterministic implementation on any device."""

    def forward(self, model, images, targets):
        loss, logits = super().forward(model, images, targets)
        zero = torch.zeros(2).put_(torch.tensor([0]), torch.tensor([0.0]))
        return loss + zero.sum(), logits


def test_an_operator_that_may_vary_is_an_error_that_names_it(warm, tmp_path) -> None:
    done = vit_train_forked(*PUTS, "run_dir=run", "trainer.deterministic=true", cwd=tmp_path, check=False)
    assert (done.code, done.err.count("\n")) == (2, 1), done
    assert done.err == (
        "vit-train: error: trainer.deterministic=true: put_ does not have a deterministic implementation\n"
    )


def test_without_the_setting_the_same_run_goes_through(warm, tmp_path) -> None:
    vit_train_forked(*PUTS, "run_dir=run", cwd=tmp_path)


def test_on_a_cpu_it_changes_nothing(warm, tmp_path) -> None:
    for value in ("true", "false"):
        vit_train_forked(*ONE, f"trainer.deterministic={value}", f"run_dir=run_{value}", cwd=tmp_path)
    assert whole_state(tmp_path / "run_true") == whole_state(tmp_path / "run_false")


@pytest.mark.parametrize("order", ["true,false", "false,true"])
def test_in_a_sweep_each_run_has_its_own(warm, tmp_path, order) -> None:
    """One process: the setting of one run does not stay for the next."""
    home = "hydra.sweep.dir=swept"
    done = vit_train_forked("-m", *PUTS, home, f"trainer.deterministic={order}", cwd=tmp_path, check=False)
    assert done.code == 2
    assert done.err.count("put_ does not have a deterministic implementation") == 1
    finished = [(tmp_path / f"swept/{job}/result.json").exists() for job in (0, 1)]
    assert finished == [value == "false" for value in order.split(",")]
