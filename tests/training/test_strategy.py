"""Devices, and data parallelism with what a CPU allows: cutting, joining, uneven batches, clean keys."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import PATCHES, TINY, build, compose
from omegaconf import OmegaConf
from torch import nn

from vit_train.construct import make
from vit_train.errors import ConfigError
from vit_train.training.strategy import DataParallel, SingleDevice, auto, gather, resolve_device, scatter

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("batch", "devices", "sizes"),
    [(8, 2, [4, 4]), (7, 2, [4, 3]), (7, 3, [3, 2, 2]), (2, 4, [1, 1]), (1, 2, [1])],
)
def test_scatter_cuts_unevenly_and_gather_restores_the_order(
    batch: int, devices: int, sizes: list[int]
) -> None:
    images = torch.arange(batch * 3.0).reshape(batch, 3)
    shares = scatter(images, [CPU] * devices)
    assert [len(share) for share in shares] == sizes
    assert torch.equal(gather(shares, CPU), images)


def test_gather_joins_pairs_of_logits() -> None:
    pairs = [(torch.zeros(2, 3), torch.ones(2, 3)), (torch.zeros(1, 3), torch.ones(1, 3))]
    first, second = gather(pairs, CPU)
    assert first.shape == second.shape == (3, 3)
    assert second.eq(1).all()


@pytest.mark.parametrize("batch", [6, 7, 1])
def test_an_uneven_batch_gives_the_mean_and_the_gradients_of_one_device(batch: int) -> None:
    torch.manual_seed(0)
    single = nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3))
    parallel = copy.deepcopy(single)
    images, targets = torch.randn(batch, 5), torch.arange(batch) % 3
    losses = []
    for model, strategy in (
        (single, SingleDevice(device="cpu")),
        (parallel, DataParallel(devices=("cpu",) * 3)),
    ):
        loss = nn.functional.cross_entropy(strategy.wrap(model)(images), targets)
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses)
    for a, b in zip(single.parameters(), parallel.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_parallel_run_saves_the_keys_of_a_single_one(in_tmp) -> None:
    keys = []
    for strategy in ("single", "data_parallel"):
        devices = ["strategy.devices=[cpu,cpu]"] if strategy == "data_parallel" else []
        run = build(*TINY, f"strategy={strategy}", *devices, f"run_dir={strategy}", "trainer.max_steps=1")
        run.trainer.fit()
        trainer = run.trainer
        keys.append(set(trainer.strategy.snapshot(trainer.model, trainer.ema, trainer.optimizer)))
    assert keys[0] == keys[1]
    assert not any("module." in key or "_orig_mod" in key for key in keys[1])


def test_a_parallel_step_learns_what_a_single_one_does(in_tmp) -> None:
    # dropout draws differ with the cut, so there is none here
    quiet = (
        "model.drop_rate=0",
        "model.attn_drop_rate=0",
        "model.drop_path_rate=0",
        "trainer.precision=fp32",
        "model.qkv_bias=false",  # the gradient of a key's bias is rounding alone, which Adam scales up
    )
    weights = []
    for extra in (["strategy=single"], ["strategy=data_parallel", "strategy.devices=[cpu,cpu,cpu]"]):
        run = build(*TINY, *PATCHES, *quiet, *extra, f"run_dir={len(weights)}", "trainer.max_steps=5")
        run.trainer.fit()
        weights.append(run.trainer.model.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=1e-4)


def test_compile_is_refused_with_data_parallel(in_tmp) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.compile=true does not work with data_parallel"):
        build(*TINY, "strategy=data_parallel", "strategy.devices=[cpu,cpu]", "trainer.compile=true")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu_is_said() -> None:
    with pytest.raises(ValueError, match="finds no GPU; type strategy=single"):
        DataParallel()
    with pytest.raises(ValueError, match="is not available"):
        resolve_device("cuda:0")


def test_an_unknown_device_is_said() -> None:
    with pytest.raises(ValueError, match="is not one of auto, cpu"):
        resolve_device("gpu")


def test_auto_is_one_device_under_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("RANK", "0")
    assert type(auto(device="cpu")) is SingleDevice


def test_auto_keeps_the_threads_on_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine need not have any: the devices are only named here, nothing runs on them."""
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with monkeypatch.context() as named_only:
        named_only.setattr("vit_train.training.strategy.resolve_device", torch.device)
        chosen = auto(num_threads=3)
    assert isinstance(chosen, DataParallel)
    assert (chosen.devices, chosen.num_threads) == ([torch.device("cuda:0"), torch.device("cuda:1")], 3)
    # a model of 8 pixels is not worth a second card
    tiny = make(OmegaConf.to_container(compose("data=digits").strategy))
    assert (type(tiny), tiny.num_threads) == (SingleDevice, 1)


def test_a_snapshot_is_a_copy() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    snapshot = SingleDevice(device="cpu").snapshot(model, None, optimizer)
    before = snapshot["model/weight"].clone()
    with torch.no_grad():
        model.weight.add_(1)
    assert torch.equal(snapshot["model/weight"], before)


def test_a_replica_in_a_thread_computes_in_the_precision_of_the_step() -> None:
    """Autocast's type belongs to a thread; what parallel_apply starts begins with the default one."""
    import threading

    seen = []

    class Probe(nn.Module):
        def forward(self, x):
            seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
            return x

    strategy = DataParallel(devices=("cpu", "cpu"))
    with torch.autocast("cpu", dtype=torch.float16):  # not the CPU's default
        call = strategy._in_thread(Probe(), 0)
    thread = threading.Thread(target=call, args=(torch.zeros(1),))
    thread.start()
    thread.join()
    assert seen == [(True, torch.float16)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_data_parallel_over_the_gpus_present() -> None:
    count = torch.cuda.device_count()
    # with one GPU it takes part twice: everything but a second card
    devices = tuple(f"cuda:{i}" for i in range(count)) if count > 1 else ("cuda:0", "cuda:0")
    torch.manual_seed(0)
    single = nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3)).to("cuda:0")
    parallel = copy.deepcopy(single)
    images, targets = torch.randn(7, 5, device="cuda:0"), (torch.arange(7) % 3).to("cuda:0")
    losses = []
    for model, strategy in (
        (single, SingleDevice(device="cuda:0")),
        (parallel, DataParallel(devices=devices)),
    ):
        loss = nn.functional.cross_entropy(strategy.wrap(model)(images), targets)
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses)
    for a, b in zip(single.parameters(), parallel.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
