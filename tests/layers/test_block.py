import pytest
import torch
from torch import nn

from vit_train.layers import Attention, Block, DropPath, drop_path_schedule


def block(**overrides):
    torch.manual_seed(0)
    return Block(16, Attention(16, num_heads=2), mlp_ratio=2.0, **overrides)


def test_pre_norm_and_post_norm_follow_their_formulas():
    x = torch.randn(2, 5, 16)
    for norm_first in (True, False):
        module = block(norm_first=norm_first)
        for norm in (module.norm1, module.norm2):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        if norm_first:
            y = x + module.attn(module.norm1(x))
            y = y + module.mlp(module.norm2(y))
        else:
            y = module.norm1(x + module.attn(x))
            y = module.norm2(y + module.mlp(y))
        torch.testing.assert_close(module(x), y)
    torch.testing.assert_close(block(norm_first=False)(x).mean(-1), torch.zeros(2, 5), rtol=0, atol=1e-5)


def test_post_norm_equals_torch_encoder_layer():
    module = block(norm_first=False, norm_eps=1e-5)
    reference = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation="gelu", batch_first=True)
    names = {
        "self_attn.in_proj_": "attn.qkv.",
        "self_attn.out_proj.": "attn.proj.",
        "linear1.": "mlp.fc1.",
        "linear2.": "mlp.fc2.",
        "norm1.": "norm1.",
        "norm2.": "norm2.",
    }
    ours = module.state_dict()
    reference.load_state_dict(
        {theirs + p: ours[mine + p] for theirs, mine in names.items() for p in ("weight", "bias")}
    )
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(module(x), reference(x), rtol=1e-5, atol=1e-5)


def test_the_block_takes_maps_as_well():
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    module = Block(8, Double(), mlp_ratio=1.0)
    x = torch.randn(2, 3, 4, 8)
    torch.testing.assert_close(module(x), module(x.flatten(1, 2)).view(2, 3, 4, 8))


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    y = DropPath(0.25)(torch.ones(4000, 3, 2))
    assert (y == y[:, :1, :1]).all()
    values, counts = y[:, 0, 0].unique(return_counts=True)
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / 0.75]))
    assert abs(counts[0].item() / 4000 - 0.25) < 0.03
    assert abs(y.mean().item() - 1) < 0.03


def test_drop_path_is_the_identity_in_evaluation_and_at_rate_zero():
    x = torch.randn(3, 4)
    assert DropPath(0.5).eval()(x) is x
    state = torch.get_rng_state()
    assert DropPath(0.0)(x) is x
    assert torch.equal(state, torch.get_rng_state())


def test_a_block_in_evaluation_is_deterministic():
    module = block(drop=0.5, drop_path=0.5)
    x = torch.randn(8, 5, 16)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_drop_path_schedule():
    assert drop_path_schedule(0.2, 3) == pytest.approx([0.0, 0.1, 0.2])
    assert drop_path_schedule(0.2, 1) == [0.0]
