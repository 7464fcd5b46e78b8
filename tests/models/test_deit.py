import pytest
import torch
from conftest import with_trained_head

from vit_train.construct import check, make
from vit_train.errors import ConfigError
from vit_train.layers import PatchEmbed
from vit_train.models import DeiT


def small():
    torch.manual_seed(0)
    patch_embed = PatchEmbed(img_size=16, patch_size=4, in_channels=3, embed_dim=24)
    return with_trained_head(DeiT(patch_embed=patch_embed, embed_dim=24, depth=2, num_heads=4, num_classes=5))


def test_two_heads_in_training_and_their_mean_in_evaluation():
    model = small()
    images = torch.randn(3, 3, 16, 16)
    logits, distill_logits = model(images)
    assert logits.shape == distill_logits.shape == (3, 5)
    assert not torch.allclose(logits, distill_logits)
    torch.testing.assert_close(model.eval()(images), (logits + distill_logits) / 2)


def test_each_head_reads_its_own_token():
    model = small()
    features = torch.randn(3, 18, 24)
    logits, distill_logits = model.forward_head(features)
    torch.testing.assert_close(logits, model.head(features[:, 0]))
    torch.testing.assert_close(distill_logits, model.head_dist(features[:, 1]))


def test_tokens_enter_in_the_order_of_the_published_weights():
    model = small()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.randn(1, 3, 16, 16))
    first_two = torch.cat([model.cls_token, model.dist_token], dim=1) + model.pos_embed[:, :2]
    torch.testing.assert_close(seen[0][:, :2], first_two)
    assert model.pos_embed.shape == (1, 18, 24)


def test_the_other_arguments_are_those_of_a_vit():
    node = {
        "_target_": "vit_train.models.DeiT",
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 4,
        "num_classes": 5,
        "norm_first": False,
        "head": "mlp",
        "patch_embed": {
            "_target_": "vit_train.layers.PatchEmbed",
            "img_size": 16,
            "patch_size": 4,
            "in_channels": 3,
            "embed_dim": 24,
        },
    }
    assert check(node) == []
    logits, distill_logits = make(node)(torch.randn(3, 3, 16, 16))
    assert logits.shape == distill_logits.shape == (3, 5)
    with pytest.raises(ConfigError, match="model: pool: the two heads of a DeiT see their tokens"):
        make({**node, "pool": "mean"}, key="model")
    assert check({**node, "drop_rate": 1.0}, key="model") == ["model.drop_rate: must be less than 1, got 1.0"]
