"""What only a GPU can show: every family trains there, in every precision, and agrees with the CPU."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY, build

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
    model = run.trainer.model.eval()
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
