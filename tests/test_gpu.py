"""What only a GPU can show: every family trains there, in every precision, and agrees with the CPU."""

from __future__ import annotations

import pytest
import torch
import yaml
from conftest import TINY, build, checkpoint_hashes, vit_train_here, with_trained_head

from vit_train.layers import attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

FAMILIES = {
    "vit": ("model=vit_digits",),
    "deit": ("model=deit_cifar", "data.img_size=32"),
    "swin": (
        "model=swin_cifar",
        "data.img_size=32",
        "model.embed_dim=24",
        "model.depths=[2,2]",
        "model.num_heads=[2,4]",
    ),
    "hybrid": ("model=hybrid_cifar", "data.img_size=32"),
    "resnet": ("model=resnet_cifar",),
}
SMALL = [override for override in TINY if not override.startswith("model.")]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_learns_on_the_gpu(in_tmp, family, precision) -> None:
    overrides = (
        *SMALL,
        *FAMILIES[family],
        f"trainer.precision={precision}",
        "trainer.epochs=4",
        "run_dir=run",
    )
    run = build(*overrides, "strategy=single", "strategy.device=cuda")
    losses = []
    run.trainer.tracker.after_epoch = lambda step, epoch, metrics: losses.append(metrics["train/loss"])
    run.trainer.fit()
    assert next(run.trainer.model.parameters()).is_cuda
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gpu_computes_what_the_cpu_does(in_tmp, family) -> None:
    run = build(*SMALL, *FAMILIES[family], "trainer.precision=fp32", "strategy=single", "strategy.device=cpu")
    model = with_trained_head(run.trainer.model).eval()
    side = run.trainer.parts.data.img_size
    images = torch.randn(4, 1, side, side)
    with torch.no_grad():
        expected = model(images)
        found = model.cuda()(images.cuda()).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_fused_attention_is_chosen_and_equal() -> None:
    torch.manual_seed(0)
    layer = attention.Attention(64, num_heads=4).eval()
    x = torch.randn(2, 65, 64)
    with torch.no_grad():
        expected = layer(x)
        found = layer.cuda()(x.cuda()).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_auto_precision_is_bf16_where_the_gpu_computes_in_it(in_tmp) -> None:
    run = build(*TINY, "trainer.precision=auto", "strategy=single", "strategy.device=cuda")
    wanted = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    assert run.trainer.precision == wanted


EXACT = (
    *SMALL,
    "model=vit_cifar",
    "model.depth=2",
    "model.drop_rate=0.1",
    "model.drop_path_rate=0.2",
    "data.img_size=32",
    "trainer.precision=bf16",
    "trainer.compile=true",
    "trainer.deterministic=true",
    "strategy=single",
    "strategy.device=cuda",
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """15 steps, compiled, in bf16, with deterministic operators."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    vit_train_here(*EXACT, "run_dir=run", cwd=folder)
    return checkpoint_hashes(folder / "run")


@pytest.mark.parametrize("stop", [1, 4, 5, 8, 14])
def test_interrupted_equals_uninterrupted_on_the_gpu(uninterrupted, tmp_path, stop) -> None:
    assert vit_train_here(*EXACT, "run_dir=run", f"trainer.stop_at_step={stop}", cwd=tmp_path).code == 0
    assert checkpoint_hashes(tmp_path / "run") != uninterrupted
    assert vit_train_here("resume=run", cwd=tmp_path).code == 0
    assert checkpoint_hashes(tmp_path / "run") == uninterrupted


@pytest.fixture
def little_memory():
    """One gigabyte of the GPU, all that this process may use meanwhile."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2**30 / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


LARGE = (
    *SMALL,
    "model=vit_tiny",
    "data.img_size=224",
    "data.limit=512",
    "data.batch_size=512",
    "trainer.epochs=1",
    "trainer.grad_accum_steps=1",
    "strategy=single",
    "strategy.device=cuda",
    "run_dir=run",
)


def test_a_batch_that_does_not_fit_says_what_to_type(little_memory, tmp_path) -> None:
    done = vit_train_here(*LARGE, cwd=tmp_path)
    assert done.code == 7
    for word in ("out of memory", "ViT", "data.batch_size=512", "GiB", "trainer.grad_accum_steps=2"):
        assert word in done.err


def test_the_micro_batch_is_halved_until_it_fits(little_memory, tmp_path) -> None:
    done = vit_train_here(*LARGE, "trainer.auto_batch=true", cwd=tmp_path)
    assert done.code == 0, done.err
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["trainer"]["grad_accum_steps"] in (2, 4, 8, 16, 32, 64, 128)
    assert config["data"]["batch_size"] == 512
