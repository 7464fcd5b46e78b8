import pytest
import torch
import torch.nn.functional as F
from torchvision.models.swin_transformer import ShiftedWindowAttention

from vit_train.layers import Attention, attend
from vit_train.layers.attention import prefers_fused


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("tokens", [9, 65])
def test_fused_equals_plain_with_gradients(with_bias, tokens):
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, 3, tokens, 8, requires_grad=True) for _ in range(3))
        bias = torch.randn(3, tokens, tokens)
        bias[:, :, 1] = float("-inf")
        bias.requires_grad_()
        out = attend(q, k, v, bias=bias if with_bias else None, fused=fused)
        out.square().sum().backward()
        results.append([out, q.grad, k.grad, v.grad, *([bias.grad] if with_bias else [])])
    for plain, fused in zip(*results):
        torch.testing.assert_close(plain, fused, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [16, 64])
def test_bf16_autocast_stays_near_fp32(tokens):
    torch.manual_seed(0)
    attn = Attention(64, num_heads=4)
    x = 4 * torch.randn(2, tokens, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = attn(x)
        q, k, v = attn.heads(x)
        uniform = attend(torch.zeros_like(q), k, v, bias=torch.full((tokens, tokens), 300.0))
    assert low.dtype == torch.bfloat16
    exact = attn(x)
    assert (low.float() - exact).norm() < 0.02 * exact.norm()
    # Large equal scores: the weights are 1 / N, not overflow.
    expected = v.float().mean(-2, keepdim=True).expand_as(v)
    torch.testing.assert_close(uniform.float(), expected, rtol=0.02, atol=0.02)


def test_the_choice_follows_device_and_length():
    assert not prefers_fused(torch.empty(1, 1, 197, 8))
    assert prefers_fused(torch.empty(1, 1, 1025, 8))
    assert not prefers_fused(torch.empty(1, 1, 197, 8, device="meta"))


def test_attention_equals_torch_multihead_attention():
    torch.manual_seed(0)
    attn = Attention(32, num_heads=4)
    reference = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    reference.load_state_dict(
        {
            "in_proj_weight": attn.qkv.weight,
            "in_proj_bias": attn.qkv.bias,
            "out_proj.weight": attn.proj.weight,
            "out_proj.bias": attn.proj.bias,
        }
    )
    x = torch.randn(2, 10, 32)
    torch.testing.assert_close(attn(x), reference(x, x, x, need_weights=False)[0], rtol=1e-5, atol=1e-6)


def test_dropout_only_in_training():
    torch.manual_seed(0)
    attn = Attention(32, num_heads=4, attn_drop=0.5)
    x = torch.randn(2, 10, 32)
    assert not torch.equal(attn(x), attn(x))
    attn.eval()
    assert torch.equal(attn(x), attn(x))


@pytest.mark.parametrize("fused", [False, True])
def test_attention_dropout_keeps_the_mean(fused):
    torch.manual_seed(0)
    q = k = torch.zeros(64, 1, 50, 4)
    v = torch.ones(64, 1, 50, 4)
    out = attend(q, k, v, dropout=0.3, fused=fused)
    assert out.std() > 0
    assert abs(out.mean().item() - 1) < 0.02


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="num_heads 5 does not divide embed_dim 192; use one of 1, 2, 3, 4"):
        Attention(192, num_heads=5)


def test_no_qkv_bias():
    attn = Attention(8, num_heads=2, qkv_bias=False)
    assert attn.qkv.bias is None
    assert F.mse_loss(attn(torch.zeros(1, 3, 8)), attn.proj.bias.expand(1, 3, 8)) == 0


def relative(grid_size, **options):
    torch.manual_seed(0)
    attn = Attention(32, num_heads=4, grid_size=grid_size, **options)
    torch.nn.init.normal_(attn.relative_position_bias_table)  # so large that a wrong index shows
    return attn


def test_relative_positions_equal_those_of_torchvisions_swin():
    """In a map that is one window both are the same attention."""
    attn = relative((7, 7))
    reference = ShiftedWindowAttention(32, [7, 7], [0, 0], 4)
    reference.load_state_dict(attn.state_dict(), strict=False)
    x = torch.randn(2, 49, 32)
    expected = reference(x.view(2, 7, 7, 32)).view(2, 49, 32)
    torch.testing.assert_close(attn(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("h", "w"), [(3, 5), (5, 3), (1, 4)])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_relative_positions_pair_by_pair(h, w, prefix):
    attn, side = relative((h, w)), max(h, w)
    expected = torch.zeros(4, prefix + h * w, prefix + h * w)
    for i in range(h * w):
        for j in range(h * w):
            down, right = i // w - j // w, i % w - j % w
            row = attn.relative_position_bias_table[(down + side - 1) * (2 * side - 1) + right + side - 1]
            expected[:, prefix + i, prefix + j] = row
    assert torch.equal(attn.bias(prefix + h * w), expected)
    x = torch.randn(1, prefix + h * w, 32)
    q, k, v = attn.heads(x)
    weights = (q @ k.transpose(-2, -1) / 8**0.5 + expected).softmax(-1)
    torch.testing.assert_close(attn.weights(x), weights)
    out = attn.proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attn(x), out, rtol=1e-5, atol=1e-6)
