"""Which parameter decays and at which rate, against timm; whole training steps, against a loop written here in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from vit_train.config.build import build_run
from vit_train.config.check import Launch, config_dir
from vit_train.layers import PatchEmbed
from vit_train.models import DeiT, HybridEmbed, Swin, ViT
from vit_train.report.console import Console
from vit_train.training.guard import Guard, Signals
from vit_train.training.muon import Muon, orthogonal
from vit_train.training.objective import CrossEntropy
from vit_train.training.optimizers import adamw, muon, sgd
from vit_train.training.tracker import NullTracker


def patches(embed_dim=12, **settings):
    return PatchEmbed(img_size=16, patch_size=4, in_channels=3, embed_dim=embed_dim, **settings)


def transformer(kind, depth, patch_embed=None):
    return kind(patch_embed=patch_embed or patches(), embed_dim=12, depth=depth, num_heads=2, num_classes=5)


def hybrid(depth):
    trunk = HybridEmbed(img_size=32, backbone="resnet18", layer="layer1", in_channels=3, embed_dim=12)
    return transformer(ViT, depth, trunk)


SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "num_classes": 5}
# ours, and timm's of the same sizes
FAMILIES = {
    "vit": (lambda n: transformer(ViT, n), lambda n: VisionTransformer(**SIZES, depth=n, num_heads=2)),
    "deit": (
        lambda n: transformer(DeiT, n),
        lambda n: VisionTransformerDistilled(**SIZES, depth=n, num_heads=2),
    ),
    "swin": (
        lambda n: Swin(
            patch_embed=patches(norm=True, any_size=True),
            embed_dim=12,
            depths=(2, n),
            num_heads=(2, 4),
            window_size=2,
            num_classes=5,
        ),
        lambda n: SwinTransformer(**SIZES, depths=(2, n), num_heads=(2, 4), window_size=2),
    ),
}


def by_name(model, groups, key):
    """Parameter name -> what its group says. Every trained parameter is in one group."""
    names = {id(p): name.replace("head.fc.", "head.") for name, p in model.named_parameters()}
    pairs = [(names[id(p)], group[key]) for group in groups for p in group["params"]]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(pairs) == len(dict(pairs)) == len(trained)
    return dict(pairs)


@settings(max_examples=12)
@given(family=st.sampled_from(sorted(FAMILIES)), depth=st.integers(1, 3), decay=st.sampled_from([0.05, 0.3]))
def test_the_same_parameters_decay_as_in_timm(family, depth, decay) -> None:
    ours, theirs = (make(depth) for make in FAMILIES[family])
    for model in (ours, theirs):
        model.norm.weight.requires_grad_(depth != 2)  # a frozen one is in no group
    expected = param_groups_weight_decay(theirs, decay, no_weight_decay_list=theirs.no_weight_decay())
    for factory in (adamw, muon):
        groups = factory(ours, lr=0.1, weight_decay=decay).param_groups
        assert by_name(ours, groups, "weight_decay") == by_name(theirs, expected, "weight_decay")
        assert {group["lr"] for group in groups} == {0.1}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_muon_turns_matrices_and_leaves_the_rest_to_adamw(family) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family][0](2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = muon(model, lr=0.01, weight_decay=0.1)
    for name, p in model.named_parameters():
        p.grad = torch.randn_like(p)
        if p.ndim == 2:  # singular values from 1 to 5: far from the 1 that all become, none lost in rounding
            for matrix in p.grad.chunk(3 if "qkv" in name else 1):
                left, each, right = torch.linalg.svd(matrix, full_matrices=False)
                matrix.copy_(left @ torch.linspace(1, 5, len(each)).diag() @ right)
    optimizer.step()
    turned = set()
    for name, p in model.named_parameters():
        if "momentum_buffer" not in optimizer.state[p]:
            decay = 0.1 if p.ndim > 1 and name not in model.no_weight_decay() else 0
            expected = before[name] * (1 - 0.01 * decay) - 0.01 * p.grad.sign()  # Adam's first step
            torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-6)
            continue
        turned.add(name)
        moved = (before[name] * (1 - 0.01 * 0.1) - p.detach()) / (0.01 * 0.2)
        count = 3 if "qkv" in name else 1  # query, key and value: each has singular values of its own
        for gradient, step in zip(p.grad.chunk(count), moved.chunk(count)):
            left, _, right = torch.linalg.svd(gradient, full_matrices=False)
            in_its_axes = left.T @ step @ right.T / max(step.shape) ** 0.5  # a diagonal near 1
            values = in_its_axes.diagonal()
            assert ((values > 0.6) & (values < 1.3)).all(), name
            assert (in_its_axes - values.diag()).abs().max() < 0.05, name
    inner = {n for n, p in model.named_parameters() if p.ndim == 2 and ("blocks." in n or "reduction" in n)}
    assert turned == {name for name in inner if not name.endswith("bias_table")}


@settings(max_examples=30)
@given(
    shape=st.sampled_from([(1, 1), (5, 33), (40, 7), (64, 64), (65, 130)]),
    least=st.sampled_from([1.0, 0.3, 0.02]),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_orthogonal_is_near_the_polar_factor(shape, least, scale, seed) -> None:
    """Singular vectors as they are, values near 1, whatever the size of the matrix and of its entries."""
    generator = torch.Generator().manual_seed(seed)
    left, _, right = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    values = torch.logspace(0, math.log10(least), len(right))
    found = orthogonal(scale * (left * values) @ right).float()
    in_its_axes = left.T @ found @ right.T
    assert 0.65 < in_its_axes.diagonal().min() <= in_its_axes.diagonal().max() < 1.25
    assert (in_its_axes - in_its_axes.diagonal().diag()).abs().max() < 0.05


def test_steps_of_muon_are_those_of_torchs() -> None:
    """Its orthogonal matrix is computed in bf16, ours where that is faster: 2 percent of the steps' size."""
    torch.manual_seed(0)
    lr, steps = 0.01, 6
    for shape in ((7, 7), (5, 33), (70, 12)):
        ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
        pair = (
            Muon([ours], lr=lr, momentum=0.9, weight_decay=0.3),
            torch.optim.Muon([theirs], lr=lr, momentum=0.9, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"),
        )
        size = lr * 0.2 * max(shape) ** 0.5  # of a singular value in one step
        for _ in range(steps):
            ours.grad = torch.randn(shape)
            theirs.grad = ours.grad.clone()
            for optimizer in pair:
                optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02 * steps * size)
        assert (ours - 1).abs().max() > 0.5 * size
    assert pair[0].state[ours]["momentum_buffer"].equal(pair[1].state[theirs]["momentum_buffer"])


def test_the_same_parameters_of_a_hybrid_decay_as_in_timm() -> None:
    """timm's rule on our model, with the names that its ViT exempts: convolutions decay, batch norms do not."""
    model = hybrid(2)
    exempt = VisionTransformer(**SIZES, depth=1, num_heads=2).no_weight_decay()
    expected = by_name(
        model, param_groups_weight_decay(model, 0.05, no_weight_decay_list=exempt), "weight_decay"
    )
    assert by_name(model, sgd(model, lr=0.1, weight_decay=0.05).param_groups, "weight_decay") == expected
    assert expected["patch_embed.backbone.conv1.weight"] == 0.05
    assert expected["patch_embed.backbone.bn1.weight"] == 0


@settings(max_examples=12)
@given(
    family=st.sampled_from(sorted(FAMILIES)), depth=st.integers(1, 3), decay=st.sampled_from([0.5, 0.75, 0.9])
)
def test_rates_fall_from_layer_to_layer_as_in_timm(family, depth, decay) -> None:
    """But for the last norm: with the head, as in BEiT's own code; timm has it with the last block."""
    ours, theirs = (make(depth) for make in FAMILIES[family])
    expected = by_name(theirs, timm_groups(theirs, decay), "lr_scale")
    factory = adamw if depth == 1 else muon
    groups = factory(ours, lr=0.1, weight_decay=0.05, layer_decay=decay).param_groups
    rates = by_name(ours, groups, "lr")
    for name in ("norm.weight", "norm.bias"):
        assert (rates.pop(name), expected.pop(name)) == (0.1, decay)
    assert rates == pytest.approx({name: 0.1 * scale for name, scale in expected.items()}, rel=1e-12)
    assert rates["head.weight"] == 0.1
    decays = by_name(theirs, timm_groups(theirs, decay), "weight_decay")
    assert by_name(ours, groups, "weight_decay") == decays


def timm_groups(model, decay):
    return param_groups_layer_decay(
        model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=decay
    )


@pytest.mark.parametrize("depth", [1, 3])
def test_all_of_a_hybrids_trunk_is_the_lowest_layer(depth) -> None:
    model = hybrid(depth)
    rates = by_name(model, adamw(model, lr=0.1, layer_decay=0.5).param_groups, "lr")
    for name, rate in rates.items():
        first, _, rest = name.partition(".")
        layers = {
            "head": 0,
            "norm": 0,
            "blocks": depth - int(rest.partition(".")[0] or 0) if first == "blocks" else 0,
        }
        assert rate == pytest.approx(0.1 * 0.5 ** layers.get(first, depth + 1), rel=1e-12), name


# ------------------------------------------------------------------------------------------------ whole steps
class Recording(CrossEntropy):
    """In float64, where the program's own takes the logits as float32. Remembers the micro-batches."""

    def forward(self, model, images, targets):
        self.seen = [*getattr(self, "seen", []), (images.double(), targets)]
        logits = model(images.double())
        return nn.functional.cross_entropy(logits, targets), logits.detach()


def trained(folder, *chosen, steps):
    """A model before and after some steps of the trainer, and the micro-batches it took."""
    typed = (
        "data.limit=60",
        "data.batch_size=12",
        "model=vit_tiny",  # without batch norm, which sees micro-batches
        "model.patch_embed.patch_size=2",
        "model.depth=2",
        "model.embed_dim=16",
        "model.num_heads=2",
        "model.qkv_bias=false",  # the gradient of a key's bias is rounding alone, which Adam scales up
        "model.drop_rate=0",
        "model.attn_drop_rate=0",
        "model.drop_path_rate=0",
        "objective._target_=test_reference_optimizers.Recording",
        "objective.label_smoothing=0",
        "trainer.precision=fp32",
        "trainer.ema_decay=null",
        f"run_dir={folder}",
        *chosen,
    )
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", overrides=list(typed))
    trainer = build_run(cfg, Launch(overrides=list(typed), choices={}), Console()).trainer
    trainer.tracker = NullTracker()
    trainer.model.double()  # in place: the optimizer holds the same parameters
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.guard = Guard(trainer.strategy, Signals())
    while trainer.state.step < steps:
        epoch, first = divmod(trainer.state.step, trainer.steps_per_epoch)
        trainer.train_loader.set_position(epoch, first)
        for batch in trainer.train_loader:
            trainer.train_step(batch, epoch)
            if trainer.state.step == steps:
                break
    return trainer.model, before, trainer.objective.seen


def loop(model, before, micro_batches, rate, rule, *, pieces, clip, layer_decay, weight_decay):
    """The same steps from `before`: gradients by autograd, all that follows by hand. `rule` updates in place:
    (parameter, gradient, slots, step from 1, rate, decay)."""
    parameters = {name: p.clone().requires_grad_() for name, p in before.items()}
    slots = {name: {} for name in before}
    scales = {name: layer_decay ** (3 - layer(name)) for name in before}
    for step in range(len(micro_batches) // pieces):
        taken = micro_batches[step * pieces : (step + 1) * pieces]
        images, targets = (torch.cat(part) for part in zip(*taken))
        logits = torch.func.functional_call(model, parameters, (images,))
        loss = (logits.logsumexp(1) - logits[torch.arange(len(targets)), targets]).mean()
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))
        norm = math.sqrt(sum(float((g * g).sum()) for g in gradients.values()))
        scale = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        with torch.no_grad():
            for name, p in parameters.items():
                decays = p.ndim > 1 and name not in ("pos_embed", "cls_token")
                decay = weight_decay if decays or rule is adam_rule else 0.0
                rule(p, gradients[name] * scale, slots[name], step + 1, rate(step) * scales[name], decay)
    return parameters


def layer(name):
    """0 the patches, 1 and 2 the blocks, 3 the norm and the head."""
    first, _, rest = name.partition(".")
    return int(rest[0]) + 1 if first == "blocks" else 3 if first in ("norm", "head") else 0


def moments(gradient, slots, step):
    """Adam's direction, Kingma and Ba 2015, algorithm 1, with eps outside the root."""
    slots["m"] = 0.9 * slots.get("m", 0) + 0.1 * gradient
    slots["v"] = 0.999 * slots.get("v", 0) + 0.001 * gradient * gradient
    return slots["m"] / (1 - 0.9**step) / ((slots["v"] / (1 - 0.999**step)).sqrt() + 1e-8)


def adamw_rule(p, gradient, slots, step, rate, decay):
    p.sub_(rate * decay * p)
    p.sub_(rate * moments(gradient, slots, step))


def adam_rule(p, gradient, slots, step, rate, decay):
    """Decay is L2, on everything."""
    p.sub_(rate * moments(gradient + decay * p, slots, step))


def sgd_rule(p, gradient, slots, step, rate, decay):
    """Nesterov momentum of 0.9."""
    del step
    gradient = gradient + decay * p
    slots["b"] = 0.9 * slots.get("b", 0) + gradient
    p.sub_(rate * (gradient + 0.9 * slots["b"]))


RULES = {"adamw": adamw_rule, "adam": adam_rule, "sgd": sgd_rule}
EXTRA = {"sgd": ("optimizer.nesterov=true",), "adamw": ("optimizer.betas=[0.9,0.999]",), "adam": ()}
STEPS = 7  # of 5 an epoch: into the second one


@pytest.mark.parametrize(
    ("kind", "pieces", "clip", "layer_decay", "weight_decay"),
    [
        ("adamw", 1, None, 1.0, 0.3),
        ("adamw", 3, 0.03, 0.6, 0.3),
        ("adam", 4, 0.3, 1.0, 0.3),
        ("sgd", 6, 0.03, 0.6, 0.3),
        ("sgd", 2, 100.0, 1.0, 0.0),
    ],
)
def test_steps_equal_a_plain_loop(tmp_path, kind, pieces, clip, layer_decay, weight_decay) -> None:
    """With a warmup of 3 steps, then half a cosine over 11; in float64 on both sides."""
    chosen = (
        f"optimizer={kind}",
        *EXTRA[kind],
        "optimizer.lr=0.01",
        f"optimizer.weight_decay={weight_decay}",
        *([] if kind == "adam" else [f"optimizer.layer_decay={layer_decay}"]),
        "schedule.warmup_epochs=0.6",
        "trainer.max_steps=14",
        f"trainer.grad_accum_steps={pieces}",
        f"trainer.grad_clip_norm={'null' if clip is None else clip}",
    )
    model, before, seen = trained(tmp_path / "run", *chosen, steps=STEPS)
    assert len(seen) == STEPS * pieces

    def rate(step):
        falling = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - 3) / 10))
        return 0.01 * ((step + 1) / 4 if step < 3 else falling)

    expected = loop(
        model,
        before,
        seen,
        rate,
        RULES[kind],
        pieces=pieces,
        clip=clip,
        layer_decay=layer_decay,
        weight_decay=weight_decay,
    )
    moved = {name: (p - before[name]).abs().max().item() for name, p in model.named_parameters()}
    assert min(moved.values()) > 0
    assert max(moved.values()) > 1e-3
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name].detach(), rtol=0, atol=1e-10, msg=name)
