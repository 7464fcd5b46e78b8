"""Single concerns: the average, randomness, precision, errors, and the way back to a trained model."""

from __future__ import annotations

import copy
import itertools
import json
import platform
import random
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, build, load_trained
from torch import nn

from vit_train import errors, text
from vit_train.checkpoint import Checkpointer, Snapshot, load_run, resolve_link
from vit_train.checkpoint import load as load_checkpoint
from vit_train.inference.trained import without_download
from vit_train.rng import mix, seed_cpu, seed_device
from vit_train.system.precision import autocast, grad_scaler, resolve_precision
from vit_train.training.ema import Ema

CPU = torch.device("cpu")


# ----------------------------------------------------------------------------------------------- the average
def linear(value):
    model = nn.Linear(2, 2)
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


@pytest.mark.parametrize(
    ("decay", "step", "effective"),
    [(0.999, 0, 1 / 10), (0.999, 1, 2 / 11), (0.999, 90, 0.91), (0.999, 10**6, 0.999), (0.05, 0, 0.05), (0.0, 9, 0)],
)  # fmt: skip
def test_the_decay_warms_up(decay, step, effective) -> None:
    average = Ema(linear(0.0), decay=decay)
    average.update(linear(1.0), step)
    for parameter in average.module.parameters():
        torch.testing.assert_close(parameter, torch.full_like(parameter, 1 - effective))


def test_many_updates_are_the_recursion() -> None:
    average, expected = Ema(linear(0.0), decay=0.5), 0.0
    for step in range(12):
        value = float(step % 3)
        average.update(linear(value), step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert average.module.weight[0, 0].item() == pytest.approx(expected, rel=1e-6)


def test_running_statistics_are_averaged_and_other_buffers_copied() -> None:
    model = nn.BatchNorm1d(1, momentum=1.0)  # the statistics are then those of the last batch
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    average = Ema(model, decay=0.75)
    for middle, half in ((4.0, 1.0), (8.0, 3.0)):
        model(torch.tensor([[middle - half], [middle + half]]))  # variance 2 half**2
        model.mask[0] += 1
        average.update(model, 1000)
    assert average.module.running_mean.item() == (0.75 * 0 + 0.25 * 4) * 0.75 + 0.25 * 8
    assert average.module.running_var.item() == (0.75 * 1 + 0.25 * 2) * 0.75 + 0.25 * 18
    assert average.module.num_batches_tracked.item() == 2
    assert average.module.mask.tolist() == [2.0, -torch.inf]


def test_statistics_that_stay_are_equal_to_the_last_bit() -> None:
    """A frozen batch norm's, whatever the decay."""
    model = nn.BatchNorm1d(1000)
    model.running_mean.normal_()
    model.running_var.exponential_()
    average = Ema(model.eval(), decay=0.999)
    for step in range(200):
        average.update(model, step)
    assert torch.equal(average.module.running_mean, model.running_mean)
    assert torch.equal(average.module.running_var, model.running_var)


def test_an_average_over_many_steps_needs_averaged_statistics() -> None:
    """Against statistics recomputed over all the data: nearer than those of the raw weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
    inputs, targets = torch.randn(512, 16), torch.randint(4, (512,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    average = Ema(model, decay=0.98)
    for step in range(400):
        chosen = torch.randint(512, (64,))
        nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, step)
    with torch.no_grad():
        hidden = average.module[0](inputs)
    for name, truth in (("running_mean", hidden.mean(0)), ("running_var", hidden.var(0))):
        ours, raw = getattr(average.module[1], name), getattr(model[1], name)
        assert (ours - truth).norm() < 0.7 * (raw - truth).norm(), name


def test_the_average_is_a_copy_in_evaluation_mode_without_gradients() -> None:
    model = nn.Sequential(nn.Dropout(0.5), linear(1.0)).train()
    average = Ema(model, decay=0.9)
    assert model.training
    assert not any(module.training for module in average.module.modules())
    assert not any(parameter.requires_grad for parameter in average.module.parameters())
    with torch.no_grad():
        model[1].weight.zero_()
    assert average.module[1].weight.eq(1).all()


# ------------------------------------------------------------------------------------------------ randomness
def test_mix_is_the_same_on_every_machine() -> None:
    """A change of these numbers changes every run that was ever made."""
    assert mix(0, "init") == 4070502158117572629
    assert mix(7, "step", 3, 1, 0) == 6392490769680186726
    assert mix(0, "sample", 2, 5, 0) == 8577794807705453729


def test_near_inputs_give_unrelated_seeds() -> None:
    seeds = [mix(0, "step", step, piece) for step in range(100) for piece in range(100)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    flipped = [(a ^ b).bit_count() for a, b in itertools.pairwise(seeds)]
    assert 31 < sum(flipped) / len(flipped) < 32  # half of 63 bits
    assert mix(1, 23) != mix(12, 3)
    assert mix(0, "order", 1) != mix(0, "sample", 1)


def draws():
    return torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist()


def test_seed_cpu_seeds_torch_random_and_numpy() -> None:
    seed_cpu(0, "sample", 1)
    first = draws()
    after = draws()
    seed_cpu(0, "sample", 1)
    assert draws() == first
    seed_cpu(0, "sample", 2)
    other = draws()
    for one, two, three in zip(first, after, other):
        assert one != two
        assert one != three


def test_seed_device_seeds_what_dropout_draws() -> None:
    drop = nn.Dropout(0.5)
    results = []
    for step in (1, 1, 2):
        seed_device(CPU, 0, "step", step)
        results.append(drop(torch.ones(64)))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


# ------------------------------------------------------------------------------------------------- precision
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs /proc/cpuinfo")
def test_auto_is_bf16_where_this_cpu_gains_by_it() -> None:
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next(x for x in lines if x.startswith("flags" if on_x86 else "Features")).split(":")[1].split()
    amd = any(re.fullmatch(r"vendor_id\s*: AuthenticAMD", line) for line in lines)
    gains = {"amx_tile", "avx512_bf16"} if amd else {"amx_tile"} if on_x86 else {"bf16"}
    assert resolve_precision("auto", CPU) == ("bf16" if gains & set(flags) else "fp32")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_named_precision_is_taken(precision) -> None:
    assert resolve_precision(precision, CPU) == precision


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fp16 needs a GPU; on a CPU type trainer\.precision=bf16 or fp32"):
        resolve_precision("fp16", CPU)


def test_auto_on_mps_is_fp32() -> None:
    assert resolve_precision("auto", torch.device("mps")) == "fp32"


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_forward_pass_runs_in_it(precision, dtype) -> None:
    with autocast(precision, CPU):
        assert linear(1.0)(torch.ones(1, 2)).dtype == dtype


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_scaler_is_a_no_op_but_in_fp16(precision) -> None:
    scaler, loss = grad_scaler(precision, CPU), torch.tensor(3.0)
    assert not scaler.is_enabled()
    assert scaler.scale(loss) is loss
    assert scaler.state_dict() == {}
    assert grad_scaler("fp16", CPU).is_enabled()


# ---------------------------------------------------------------------------------------------------- errors
def test_suggest() -> None:
    assert text.suggest("optimzer", ["model", "optimizer"]) == "; did you mean 'optimizer'?"
    assert text.suggest("banana", ["model", "optimizer"]) == ""
    assert text.suggest("x", iter([])) == ""
    assert text.suggest("adamW", ["adam", "adamw", "AdamX"]) == "; did you mean 'adamw'?"
    assert text.suggest("DOG", ["cat", "dog"]) == "; did you mean 'dog'?"
    assert text.suggest("depth", (name for name in ("depths", "width"))) == "; did you mean 'depths'?"


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.ConfigError, 2),
        (errors.DataError, 3),
        (errors.CheckpointError, 4),
        (errors.SaveError, 5),
        (errors.NonFiniteError, 6),
        (errors.OutOfMemoryError, 7),
        (errors.WorkerLostError, 8),
    ],
)
def test_exit_codes(kind, code) -> None:
    assert kind("a line").exit_code == code
    assert issubclass(kind, errors.VitTrainError)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_exit_code_of_a_signal(number, code) -> None:
    assert errors.Interrupted("stopped", number).exit_code == code
    assert errors.Interrupted("stopped", number).args == ("stopped",)


# ------------------------------------------------------------------------------------ the way back to a model
@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """Two steps of training; best and last are the same checkpoint."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    run = build(*TINY, f"run_dir={run_dir}", "trainer.max_steps=2", "trainer.ema_decay=0.9")
    run.trainer.fit()
    return run.trainer


@pytest.fixture(scope="module")
def images(trainer):
    return trainer.parts.eval_transform(trainer.parts.data.examples("test", 16), 0, 0)[0]


def run_of(trainer):
    return trainer.parts.checkpointer.root.parent


@pytest.fixture
def changed(trainer, tmp_path):
    """Saves the trained checkpoint again, with an intact manifest, after something changed its contents."""

    def save(change):
        stored = load_checkpoint(resolve_link(trainer.parts.checkpointer.root / "best"))
        tensors, state = dict(stored.tensors), copy.deepcopy(stored.state)
        change(tensors, state)
        state.pop("format")
        return Checkpointer(tmp_path / "changed").save(Snapshot(tensors, state, step=2, best=True, keep=1))

    return save


@pytest.mark.parametrize("weights", ["auto", "ema", "raw"])
def test_a_loaded_model_answers_as_the_trained_one(trainer, images, weights) -> None:
    trained = load_trained(run_of(trainer), device=CPU, weights=weights)
    models = {"ema": trainer.ema.module.eval(), "raw": trainer.model.eval()}
    chosen = "raw" if weights == "raw" else "ema"
    assert trained.weights == chosen
    assert not trained.model.training
    with torch.no_grad():
        answers = {name: model(images) for name, model in models.items()}
        assert torch.equal(trained.model(images), answers[chosen])
    assert not torch.equal(answers["ema"], answers["raw"])


def test_a_loaded_model_knows_how_to_be_fed(trainer) -> None:
    trained, data = load_trained(run_of(trainer), device=CPU), trainer.parts.data
    assert trained.class_names == data.class_names == [str(i) for i in range(10)]
    assert (trained.mean, trained.std) == (data.mean, data.std)
    assert (trained.img_size, trained.in_channels, trained.step) == (8, 1, 2)
    assert trained.path == run_of(trainer) / "checkpoints/step_00000002"
    assert trained.config == load_run(run_of(trainer))[0].state["config"] == trainer.parts.about["config"]


def test_without_an_average_there_are_raw_weights_only(changed) -> None:
    def drop_average(tensors, state):
        for name in [name for name in tensors if name.startswith("ema/")]:
            del tensors[name]

    path = changed(drop_average)
    assert load_trained(path, device=CPU).weights == "raw"
    with pytest.raises(errors.CheckpointError, match="holds no averaged weights; type --weights raw"):
        load_trained(path, device=CPU, weights="ema")


@pytest.mark.parametrize("where", ["model", "model.patch_embed", "model.extra"])
@pytest.mark.parametrize("target", ["canary_code.Model", "canary_code.sub.Model"])
def test_foreign_code_is_neither_run_nor_imported(changed, tmp_path, monkeypatch, where, target) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "canary_code").mkdir()
    text = f"import pathlib\npathlib.Path({str(canary)!r}).touch()\nModel = sub = list\n"
    for name in ("__init__", "sub"):
        (tmp_path / "canary_code" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))

    def name_foreign_code(tensors, state):
        node = state["config"]
        for key in where.split("."):
            node = node.setdefault(key, {})
        node["_target_"] = target

    path = changed(name_foreign_code)
    with pytest.raises(errors.CheckpointError, match=r"type --trust canary_code if the code is yours"):
        load_trained(path, device=CPU)
    assert not canary.exists()
    assert not [name for name in sys.modules if name.startswith("canary_code")]
    __import__("canary_code")  # the control: the canary sings when it is imported
    assert canary.exists()
    del sys.modules["canary_code"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("vit_train.models.vit.torch.load", "(model._target_: vit_train.models.vit.torch.load)"),
        ("vit_train.models.vit.nn.Linear", "(model._target_: vit_train.models.vit.nn.Linear)"),
        ("vit_train.modelsx.Model", "(model._target_: vit_train.modelsx.Model)"),
        ("os.system", "(model._target_: os.system)"),
        (3, "(model._target_: 3)"),
    ],
)
def test_borrowed_names_are_refused(changed, target, message) -> None:
    def borrow(tensors, state):
        state["config"]["model"] = {"_target_": target}

    with pytest.raises(errors.CheckpointError, match=f"{re.escape(message)}$"):  # nor is trust advised
        load_trained(changed(borrow), device=CPU)


def _without(*keys):
    def change(tensors, state):
        node = state
        for key in keys[:-1]:
            node = node[key]
        del node[keys[-1]]

    return change


def _with(value, *keys):
    def change(tensors, state):
        node = state
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value

    return change


def _without_a_tensor(tensors, state):
    del tensors[next(name for name in tensors if name.startswith("ema/"))]


def _with_a_tensor(tensors, state):
    tensors["ema/extra"] = torch.zeros(1)


def _of_another_shape(tensors, state):
    name = next(name for name in tensors if name.startswith("ema/"))
    tensors[name] = tensors[name].flatten()[:1]


@pytest.mark.parametrize(
    "change",
    [
        _without("config"),
        _without("config", "model"),
        _without("config", "model", "depth"),
        _without("inference"),
        _without("inference", "class_names"),
        _without("train"),
        _without("train", "step"),
        _without_a_tensor,
        _with_a_tensor,
        _of_another_shape,
        _with("ViT", "config", "model"),
        _with([1], "config"),
        _with(None, "config", "model"),
        _with("many", "config", "model", "depth"),
        _with(7, "config", "model", "num_heads"),
        _with(3, "inference", "mean"),
    ],
)
def test_what_is_missing_or_nonsense_is_a_checkpoint_error(changed, change) -> None:
    path = changed(change)
    with pytest.raises(errors.CheckpointError) as caught:
        load_trained(path, device=CPU)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_or_missing_run_is_said(trainer, tmp_path) -> None:
    with pytest.raises(errors.CheckpointError, match="does not exist"):
        load_trained(tmp_path / "nowhere", device=CPU)
    with pytest.raises(errors.CheckpointError, match="holds no checkpoint"):
        load_trained(tmp_path, device=CPU)


def test_a_checkpoint_without_a_configuration_is_said(changed) -> None:
    with pytest.raises(errors.CheckpointError, match="does not describe a model"):
        load_trained(changed(_without("config")), device=CPU)


def test_nothing_is_downloaded_for_stored_weights() -> None:
    node = {"_target_": "a.B", "patch_embed": {"_target_": "a.C", "pretrained": True}, "pretrained": True}
    before = json.dumps(node)
    off = without_download(node)
    assert (off["pretrained"], off["patch_embed"]["pretrained"]) == (False, False)
    assert json.dumps(node) == before
