"""Attention at odd sizes, with and without a bias, fused and plain, against the formula in float64 and timm."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import Attention as TimmAttention
from torch import Tensor

from vit_train.layers import Attention, attend

FUSED = st.sampled_from([True, False, None])


def written_out(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v in float64, without a softmax of torch's."""
    scores = torch.einsum("bhnd,bhmd->bhnm", q.double(), k.double()) / q.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias.double()
    exp = (scores - scores.amax(-1, keepdim=True).detach()).exp()
    return torch.einsum("bhnm,bhmd->bhnd", exp / exp.sum(-1, keepdim=True), v.double())


@st.composite
def inputs(draw):
    """q, k, v (B, H, N, d) with scores of standard deviation 1, 2 or 4, and a bias that hides keys, or None."""
    B, H, N, d = (draw(st.integers(1, most)) for most in (3, 4, 69, 19))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    q, k, v = torch.randn(3, B, H, N, d, generator=generator)
    bias = None
    if draw(st.booleans()):
        bias = torch.randn(draw(st.sampled_from([(N, N), (H, N, N), (1, 1, N)])), generator=generator)
        hidden = torch.rand(bias.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3]))
        hidden[..., draw(st.integers(0, N - 1))] = False  # every query sees a key
        bias = bias.masked_fill(hidden, float("-inf"))
    return q * draw(st.sampled_from([1, 2, 4])), k, v, bias


@given(inputs(), FUSED, st.sampled_from([torch.float32, torch.float64]))
def test_attend_and_its_gradients_are_the_formula(case, fused, dtype):
    *qkv, bias = case
    outputs = []
    for attention, kind in (
        (lambda q, k, v, bias: attend(q, k, v, bias=bias, fused=fused), dtype),
        (written_out, torch.float64),
    ):
        leaves = [x.to(kind).requires_grad_() for x in (*qkv, bias) if x is not None]
        out = attention(*leaves) if bias is not None else attention(*leaves, None)
        outputs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    close = {"rtol": 1e-4, "atol": 5e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    for ours, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(ours.double(), expected, **close)


@given(inputs(), FUSED)
def test_in_bf16_no_error_is_larger_than_rounding_explains(case, fused):
    q, k, v, bias = (x if x is None else x.bfloat16() for x in case)
    out = attend(q, k, v, bias=bias, fused=fused)
    expected = written_out(q, k, v, bias)
    assert out.dtype == torch.bfloat16
    # A number is rounded by at most 2**-9 of itself: each weight, the result and, on the way to plain scores, the
    # scaled queries, the product and its sum with the bias. What is wrong in a score is in its weight, and what is
    # wrong in any is in the sum that the weight is divided by. The fused kernel rounds less.
    unit = 2.0**-9
    size = (q.double().abs() @ k.double().abs().mT) / q.shape[-1] ** 0.5
    of_bias = 0.0 if bias is None else size + bias.double().abs().masked_fill(bias.isinf(), 0)
    wrong = unit * (2 * size + of_bias).amax(-1, keepdim=True)
    spread = written_out(q, k, v.abs(), bias)
    bound = (torch.expm1(2 * wrong) + unit) * spread + unit * expected.abs()
    assert ((out.double() - expected).abs() <= 1.01 * bound + 1e-6).all()


# Of scores whose standard deviation is 1 and 4: the size of the error over that of the result
@pytest.mark.parametrize(
    ("name", "shape", "with_bias", "plain"),
    [
        ("vit_cifar", (8, 3, 65, 64), False, (0.0046, 0.0090)),
        ("deit_tiny", (4, 3, 197, 64), False, (0.0050, 0.0112)),
        ("a window of 7", (16, 3, 49, 32), True, (0.0073, 0.0114)),
        ("a window of 4", (16, 3, 16, 32), True, (0.0037, 0.0064)),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_the_error_in_bf16_is_as_large_as_attend_says(name, shape, with_bias, plain, fused):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, *shape, generator=generator).bfloat16()
    bias = torch.randn(shape[1], shape[2], shape[2], generator=generator) if with_bias else None
    for gain, bound in zip((1, 4), (0.0033, 0.0022) if fused else plain, strict=True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = attend(gain * q, k, v, bias=bias, fused=fused)
        expected = written_out(gain * q, k, v, bias)
        assert (out.double() - expected).norm() < bound * expected.norm()


@given(
    st.integers(1, 3),
    st.integers(1, 75),
    st.integers(1, 5),
    st.integers(1, 9),
    st.booleans(),
    st.integers(0, 999),
)
def test_the_module_is_timms(batch, tokens, heads, width, qkv_bias, seed):
    torch.manual_seed(seed)
    ours = Attention(heads * width, num_heads=heads, qkv_bias=qkv_bias).double()
    theirs = TimmAttention(heads * width, num_heads=heads, qkv_bias=qkv_bias).double()
    theirs.load_state_dict(ours.state_dict())
    x = 2 * torch.randn(batch, tokens, heads * width, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)

    _, _, v = ours.heads(x)
    mixed = (ours.weights(x) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(ours.proj(mixed), theirs(x), rtol=1e-9, atol=1e-9)
