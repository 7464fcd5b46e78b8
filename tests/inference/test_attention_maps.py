"""Where a model looks: the maps against independent arithmetic and planted signals, the pictures against pixels."""

from __future__ import annotations

import functools
import math
import weakref

import numpy as np
import pytest
import torch
from conftest import TINY, build, with_trained_head
from PIL import Image
from torch import nn
from torchvision.transforms.v2.functional import pil_to_tensor

from vit_train.cli.train import pictured
from vit_train.data.transforms.sample_transforms import plain, seen_box
from vit_train.inference.attention import each_attention, explain, methods, rollout
from vit_train.layers import PatchEmbed, TrunkEmbed
from vit_train.models import DeiT, HybridEmbed, ResNet, Swin, ViT
from vit_train.report.fonts import fonts_for
from vit_train.report.overlay import Explained, Sheet, overlay, picture, place
from vit_train.report.pictures import sheet_of_attention

SIDE, PATCH, CLASSES = 16, 4, 4
GRID = SIDE // PATCH


def patches(width=32, **settings):
    return PatchEmbed(img_size=SIDE, patch_size=PATCH, in_channels=1, embed_dim=width, **settings)


def vit(family=ViT, patch_embed=None, **settings):
    about = {
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": CLASSES,
        "drop_rate": 0.1,
        **settings,
    }
    return family(patch_embed=patch_embed or patches(), **about)


def swin():
    embed = PatchEmbed(img_size=SIDE, patch_size=2, in_channels=1, embed_dim=16, norm=True, any_size=True)
    return Swin(
        patch_embed=embed, embed_dim=16, depths=(1, 1), num_heads=(1, 2), window_size=2, num_classes=CLASSES
    )


def hybrid():
    trunk = HybridEmbed(
        img_size=SIDE,
        backbone="resnet18",
        layer="layer1",
        in_channels=1,
        embed_dim=32,
        patch_size=4,
        small_stem=True,
    )
    return vit(patch_embed=trunk, pool="mean")


FAMILIES = {
    "vit_cls": vit,
    "vit_mean": lambda: vit(pool="mean"),
    "vit_post_norm": lambda: vit(norm_first=False),
    "vit_trunk": lambda: vit(
        patch_embed=TrunkEmbed(img_size=SIDE, in_channels=1, widths=(8, 32)), rel_pos=True, pool="mean"
    ),
    "deit": lambda: vit(DeiT),
    "hybrid": hybrid,
    "swin": swin,
    "resnet": lambda: ResNet(in_channels=1, widths=(8, 16), num_classes=CLASSES),
}


@pytest.fixture(params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    made = with_trained_head(FAMILIES[request.param]())
    with torch.no_grad():  # weights as large as trained ones: the attention is then far from uniform
        for parameter in made.parameters():
            parameter.mul_(2)
    return made


@pytest.fixture
def images():
    return torch.randn(2, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------ the arithmetic
def offset_bias(attn, head, i, j, N):
    if attn.relative_position_bias_table is None:
        return 0.0
    side = math.isqrt(N)  # a square grid without other tokens
    down, right = i // side - j // side, i % side - j % side
    return float(
        attn.relative_position_bias_table[(down + side - 1) * (2 * side - 1) + right + side - 1, head]
    )


def by_hand(attn, x):
    """softmax(q k^T / sqrt(d) + bias) of one image, (N, C) -> (heads, N, N), number by number in float64."""
    N, C = x.shape
    d = C // attn.num_heads
    qkv = x.double() @ attn.qkv.weight.double().T + attn.qkv.bias.double()
    weights = torch.zeros(attn.num_heads, N, N, dtype=torch.float64)
    for head in range(attn.num_heads):
        q = qkv[:, head * d : (head + 1) * d]
        k = qkv[:, C + head * d : C + (head + 1) * d]
        for i in range(N):
            scores = [float(q[i] @ k[j]) / math.sqrt(d) + offset_bias(attn, head, i, j, N) for j in range(N)]
            total = sum(math.exp(score) for score in scores)
            for j in range(N):
                weights[head, i, j] = math.exp(scores[j]) / total
    return weights


def inputs_by_hand(model, image):
    """What the attention of each block gets, walked through block by block."""
    tokens = model.patch_embed(image[None]).flatten(1, 2)
    x = torch.cat([*model.prefix_tokens(), tokens], dim=1) + model.pos_embed
    for block in model.blocks:
        if block.norm_first:
            yield block.norm1(x)[0]
            x = x + block.attn(block.norm1(x))
            x = x + block.mlp(block.norm2(x))
        else:
            yield x[0]
            x = block.norm1(x + block.attn(x))
            x = block.norm2(x + block.mlp(x))


of_all_tokens = pytest.mark.parametrize(
    "model", [name for name in FAMILIES if name not in ("swin", "resnet")], indirect=True
)


@of_all_tokens
@torch.no_grad()
def test_rollout_and_attention_are_those_of_the_papers(model, images) -> None:
    """In float64, in which no version of torch rounds by as much as is allowed here."""
    model = model.double().eval()
    weights = []
    each_attention(model, images.double(), blocks=model.blocks, use=weights.append)
    flow = rollout(model, images.double())
    torch.testing.assert_close(flow.sum(-1), torch.ones(flow.shape[:2], dtype=torch.float64))
    for b, image in enumerate(images.double()):
        blocks = [by_hand(block.attn, x) for block, x in zip(model.blocks, inputs_by_hand(model, image))]
        for seen, expected in zip(weights, blocks, strict=True):
            torch.testing.assert_close(seen[b], expected, rtol=1e-9, atol=1e-12)
        N = blocks[0].shape[-1]
        expected = torch.eye(N, dtype=torch.float64)
        for block in blocks:
            mean = sum(block) / len(block)
            mixed = torch.zeros(N, N, dtype=torch.float64)
            for i in range(N):
                for j in range(N):
                    mixed[i, j] = sum((0.5 * mean[i, k] + 0.5 * (i == k)) * expected[k, j] for k in range(N))
            expected = mixed
        torch.testing.assert_close(flow[b], expected, rtol=1e-9, atol=1e-12)


@of_all_tokens
@torch.no_grad()
def test_maps_are_the_shares_of_the_patches(model, images) -> None:
    model.eval()
    weights, classes = [], torch.zeros(2, dtype=torch.int64)
    each_attention(model, images, blocks=model.blocks[-1:], use=weights.append)
    flow = rollout(model, images)
    rolled = explain(model, images, classes, method="rollout").whole
    last = explain(model, images, classes, method="attention")
    for b in range(2):
        torch.testing.assert_close(rolled[b], shares(model, flow[b]))
        torch.testing.assert_close(last.whole[b], shares(model, weights[0][b].mean(0)))
        for head, name in enumerate(("head 1", "head 2")):
            torch.testing.assert_close(last.parts[name][b], shares(model, weights[0][b, head]))


def shares(model, flow):
    """(N, N) -> (h, w): the class token's row, of DeiT two rows, without such a token the mean of all."""
    if isinstance(model, DeiT):
        row, first = (flow[0] + flow[1]) / 2, 2
    elif model.pool == "cls":
        row, first = flow[0], 1
    else:
        row, first = flow.mean(0), 0
    return (row[first:] / row[first:].sum()).reshape(GRID, GRID)


@pytest.mark.parametrize(("method", "computed"), [("rollout", 4), ("attention", 1)])
def test_the_attention_of_one_block_is_held_at_a_time(images, method, computed) -> None:
    """Of a large model at 384 px each is 340 MB for a batch of 16: 24 of them would fill a graphics card."""
    model = vit(depth=4)
    made, alive = [], []
    for block in model.blocks:

        def watched(x, *, weights=block.attn.weights):
            alive.append(sum(earlier() is not None for earlier in made))
            found = weights(x)
            made.append(weakref.ref(found))
            return found

        block.attn.weights = watched
    explain(model, images, torch.zeros(2, dtype=torch.int64), method=method)
    assert alive == [0] * computed


@pytest.mark.parametrize("model", [(), ("model=swin_cifar", "model.window_size=4")], ids=["vit", "swin"])
def test_the_sheet_of_a_run_explains_one_image_at_a_time(in_tmp, model) -> None:
    settings = [s for s in TINY if not model or not s.startswith("model.")]
    small = ("model.embed_dim=16", "model.depths=[1,1]", "model.num_heads=[1,2]") if model else ()
    run = build(*model, *small, *settings, "trainer.ema_decay=null", "run_dir=run", "trainer.max_steps=1")
    seen = []
    run.trainer.model.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    assert sheet_of_attention(*pictured(run.trainer)).shape[1] == 4 * (2 * 144 + 4 + 20) + 20
    assert seen == [1] * 16, "the answer and the map of each of 8 images"


def test_the_last_map_of_swin_is_an_exact_sum_of_the_logit(images) -> None:
    """With a mean and a linear head Grad-CAM is the class activation map (Zhou et al. 2016)."""
    torch.manual_seed(0)
    model = with_trained_head(swin()).eval()
    found = explain(model, images, torch.tensor([1, 3]), method="gradcam").parts["stage 2"]
    with torch.no_grad():
        features = model.forward_features(images)
        logits = features @ model.head.weight.T  # of each place, without the bias
    for b, k in enumerate((1, 3)):
        expected = logits[b, :, :, k].relu()
        expected = nn.functional.interpolate(
            (expected / expected.max())[None, None], (SIDE, SIDE), mode="bilinear"
        )
        torch.testing.assert_close(found[b], expected[0, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [16, 17, 23])
def test_the_map_of_resnet_is_what_speaks_for_the_class(side) -> None:
    """A maximum and a linear head: each channel counts as much as the head weighs it."""
    torch.manual_seed(0)
    model = FAMILIES["resnet"]().eval()
    images = torch.randn(2, 1, side, side)
    maps = explain(model, images, torch.tensor([1, 3]), method="gradcam")
    assert maps.parts == {}
    with torch.no_grad():
        features = model.forward_features(images)
    for b, k in enumerate((1, 3)):
        expected = sum(w * channel for w, channel in zip(model.head.weight[k], features[b])).relu()
        expected = (expected / expected.max()).detach()[None, None]
        expected = nn.functional.interpolate(expected, (side, side), mode="bilinear")
        torch.testing.assert_close(maps.whole[b], expected[0, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [16, 14, 18, 10])
def test_maps_of_swin_cover_the_image_whatever_its_padding(side) -> None:
    """Stage 2 of a side of 14 has 4 x 4 places of 4 pixels: two of these 16 are padding and no part of the map."""
    torch.manual_seed(0)
    maps = explain(swin(), torch.randn(1, 1, side, side), torch.tensor([0]), method="gradcam")
    assert {name: tuple(m.shape) for name, m in maps.parts.items()} == {
        "stage 1": (1, side, side),
        "stage 2": (1, side, side),
    }
    assert maps.whole.shape == (1, side, side)


# ------------------------------------------------------------------------------------------- it changes nothing
def test_nothing_of_the_model_is_changed(model, images) -> None:
    model.train()
    next(iter(model.children())).eval()  # frozen, as someone fine-tuning may have it
    model.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    for method in methods(model):
        maps = explain(model, images, torch.tensor([0, 1]), method=method)
        assert maps.whole.isfinite().all()
        assert maps.whole.min() >= 0
        assert not maps.whole.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# ----------------------------------------------------------------------------------------------- planted signals
STRIPES = torch.tensor([[1.0, 1, -1, -1]]).expand(PATCH, PATCH)
TEXTURES = torch.stack([STRIPES, STRIPES.T, torch.ones(PATCH, PATCH), -torch.ones(PATCH, PATCH)])


def planted(count, seed):
    """Noise with one patch that says the class; returns also the row and column of that patch."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.randn(count, 1, SIDE, SIDE, generator=generator)
    cells = torch.randint(GRID, (count, 2), generator=generator)
    targets = torch.randint(CLASSES, (count,), generator=generator)
    for image, target, (row, column) in zip(images, targets, cells.tolist()):
        image[0, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] += (
            2 * TEXTURES[target]
        )
    return images, targets, cells


@functools.cache
def taught(family):
    """A tiny model that reads the planted patch: noise alone says nothing, so no class is known by an absence."""
    torch.manual_seed(0)
    model = FAMILIES[family]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(100):
        images, targets, _ = planted(64, seed=step)
        noise = 0.3 * torch.randn(32, 1, SIDE, SIDE)
        answers = model(torch.cat([images, noise]))
        logits = sum(answers) / 2 if isinstance(answers, tuple) else answers
        anything = torch.full((32, CLASSES), 1 / CLASSES)
        optimizer.zero_grad()
        nn.functional.cross_entropy(
            logits, torch.cat([nn.functional.one_hot(targets, CLASSES).float(), anything])
        ).backward()
        optimizer.step()
    images, targets, _ = planted(200, seed=1000)
    with torch.no_grad():
        assert (model.eval()(images).argmax(1) == targets).float().mean() > 0.97, "it did not learn"
    return model


@pytest.mark.parametrize("family", ["vit_cls", "vit_mean", "deit", "swin"])
def test_the_maximum_is_where_the_signal_was_planted(family) -> None:
    """In 95 of 100 images: the very patch of a ViT; the quadrant for Swin, whose second stage sees quadrants."""
    model = taught(family)
    images, targets, cells = planted(100, seed=2000)
    method = methods(model)[0]
    found = explain(model, images, targets, method=method).whole
    per_cell = nn.functional.adaptive_avg_pool2d(found[:, None], GRID)[:, 0]
    peaks = per_cell.flatten(1).argmax(1)
    peaks = torch.stack((peaks // GRID, peaks % GRID), 1)
    coarse = 2 if family == "swin" else 1
    assert (peaks // coarse == cells // coarse).all(1).float().mean() >= 0.95


def test_gradcam_is_of_the_class_that_was_asked_for() -> None:
    """Two patches planted in one image: each class has its own."""
    model = taught("swin")
    first, second = torch.zeros(1, 1, SIDE, SIDE), torch.zeros(1, 1, SIDE, SIDE)
    first[0, 0, :PATCH, :PATCH] = 2 * TEXTURES[0]
    second[0, 0, -PATCH:, -PATCH:] = 2 * TEXTURES[1]
    images = (first + second).expand(2, -1, -1, -1)
    for peak, expected in zip(
        explain(model, images, torch.tensor([0, 1]), method="gradcam").whole.flatten(1).argmax(1).tolist(),
        (True, False),
    ):
        row, column = divmod(peak, SIDE)
        assert (row < SIDE // 2, column < SIDE // 2) == (expected, expected)


# -------------------------------------------------------------------------------------------------- the pictures
@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize("img_size", [32, 64, 224])
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (333, 217), (250, 250), (40, 700)])
def test_the_box_is_the_part_of_the_image_the_model_gets(size, img_size, resize) -> None:
    """Cutting the box out and scaling it gives what the transform gives, but for the rounding to pixels."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    image = Image.fromarray(np.stack([x, y, 128 + 100 * np.sin(x / 9)], 2).astype(np.uint8))
    seen = plain(img_size, resize=resize)(image).float()
    box = seen_box(*size, img_size=img_size, resize=resize)
    cut = pil_to_tensor(image.resize((img_size, img_size), Image.Resampling.BICUBIC, box=box)).float()
    assert (seen - cut)[:2].abs().max() <= 3
    assert (seen - cut).abs().mean() < 1.5


def test_boxes_by_hand() -> None:
    assert seen_box(300, 200, img_size=32, resize="squash") == (0, 0, 300, 200)
    assert seen_box(96, 64, img_size=32, resize="crop") == (16, 0, 80, 64)
    # 448 x 512: the shorter side becomes 256, the longer int(292.57); of these the middle 224
    x, y = 448 / 256, 512 / 292
    assert seen_box(448, 512, img_size=224, resize="crop") == pytest.approx(
        (16 * x, 34 * y, 240 * x, 258 * y)
    )


@pytest.mark.parametrize(
    ("resize", "cell"),
    [("crop", (16, 0, 32, 16)), ("squash", (0, 0, 24, 16))],
)
def test_the_first_cell_lands_on_its_rectangle(resize, cell) -> None:
    """Of 4 x 4 cells over a picture of 96 x 64: half its height is reached exactly on the edge of the rectangle."""
    box = seen_box(96, 64, img_size=32, resize=resize)
    values = np.zeros((4, 4), dtype=np.float32)
    values[0, 0] = 1
    placed = place(values, (96, 64), box)
    left, top, right, bottom = cell
    covered = np.nan_to_num(placed) >= 0.5
    assert covered[top, :].nonzero()[0].tolist() == list(range(left, right))
    assert covered[:, left].nonzero()[0].tolist() == list(range(top, bottom))
    outside = np.ones((64, 96), dtype=bool)
    outside[:, int(box[0]) : int(box[2])] = False
    assert (np.isnan(placed) == outside).all()
    # between two centres it falls in a straight line, beyond the next centre it is 0
    width = right - left
    expected = [1 - (i + 0.5) / width for i in range(width)]
    middle = left + width // 2
    np.testing.assert_allclose(placed[top, middle : middle + width], expected, atol=1e-6)
    assert not np.nan_to_num(placed)[:, middle + width :].any()


def test_what_the_model_did_not_see_is_dimmed_and_grey() -> None:
    image = Image.new("RGB", (96, 64), (200, 100, 50))
    painted = overlay(image, np.eye(4, dtype=np.float32), (16.0, 0.0, 80.0, 64.0)).astype(int)
    outside = np.concatenate([painted[:, :16], painted[:, 80:]], 1)
    assert (outside == outside[0, 0, 0]).all()
    assert outside.max() < 0.4 * 124, "the grey of this colour is 124"
    colorful = np.ptp(painted, axis=2)
    assert colorful[2, 18] > 100, "the largest value has no colour"
    assert colorful[2, 78] == 0, "the smallest covers the image"
    bright = painted.sum(2)
    assert bright[4, 20] > bright[4, 70], "more is brighter"


def test_an_image_stays_recognisable_where_the_map_is_small() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    painted = overlay(Image.fromarray(noise), np.eye(4, dtype=np.float32), (0.0, 0.0, 64.0, 64.0))
    small = np.s_[:16, 48:]
    np.testing.assert_allclose(painted[small], 0.8 * noise[small][..., None].repeat(3, 2), atol=0.51)


@pytest.mark.parametrize("level", [0, 64, 128, 255])
def test_more_stands_out_from_any_image(level) -> None:
    """Of a white photograph too: the largest value is told from its surroundings by its colour."""
    painted = overlay(
        Image.new("L", (64, 64), level), np.eye(4, dtype=np.float32), (0.0, 0.0, 64.0, 64.0)
    ).astype(int)
    assert abs(painted[2, 2] - painted[2, 60]).max() > 90


def test_the_part_the_model_saw_is_framed_and_the_rest_explained() -> None:
    about = explained(size=(300, 200))
    cut = Explained(about.image, (50.0, 0.0, 250.0, 200.0), about.maps, about.title, about.note)
    page = picture(cut).astype(int)
    whole = picture(about).astype(int)
    left, top = position(picture(about), np.asarray(about.image))
    changed = (page[top : top + 200, left : left + 300] != whole[top : top + 200, left : left + 300]).any(2)
    assert changed[:, 50:52].mean() > 0.9
    assert changed[:, 248:250].mean() > 0.9
    assert not changed[:, :50].any()
    assert not changed[2:-2, 52:248].any()
    assert page.shape[0] > whole.shape[0], "no line for what is dark"
    assert page.shape[1] == whole.shape[1]


@pytest.mark.parametrize("size", [(60, 50), (32, 32), (134, 160), (1200, 900)])
def test_the_figures_of_a_caption_are_not_cut(size) -> None:
    """The last character of the widest caption changes the picture: it is drawn."""
    pages = []
    for end in "hx":
        about = explained(size=size)
        values = about.maps["map 0"]
        label = f"attention rollout\n10.1% to 12.3% a patc{end}"
        pages.append(picture(Explained(about.image, about.box, {label: values}, "")))
    assert (pages[0] != pages[1]).any()


def test_only_the_letter_no_font_has_is_replaced() -> None:
    rare = (chr(code) for start in (0x10600, 0x12000, 0x17000) for code in range(start, start + 64))
    lost = next((c for c in rare if c.isprintable() and fonts_for([c]) is None), None)
    if lost is None:
        pytest.skip("the fonts here have every letter")
    known = picture(explained(title="Gr\u00f6\u00dfe ?"))
    assert (picture(explained(title=f"Gr\u00f6\u00dfe {lost}")) == known).all()
    assert (picture(explained(title="Gr??e ?")) != known).any()


@pytest.mark.parametrize(
    "values", [np.zeros((2, 2)), np.full((2, 2), np.nan), np.array([[np.inf, 1], [0, 0]])]
)
def test_a_map_that_says_nothing_is_still_a_picture(values) -> None:
    painted = overlay(Image.new("L", (8, 8), 100), values.astype(np.float32), (0.0, 0.0, 8.0, 8.0))
    assert painted.shape == (8, 8, 3)


def explained(size=(300, 200), maps=1, title="cat 99.9%", mode="RGB"):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    values = {f"map {i}": np.random.default_rng(i).random((4, 4), dtype=np.float32) for i in range(maps)}
    return Explained(image, (0.0, 0.0, *map(float, size)), values, title, note="a/b.jpg")


def position(page, image):
    """Where the pixels of an image stand, unchanged, on a page: left and top."""
    height, width = image.shape[:2]
    for y, x in np.argwhere((page[:-height, :-width] == image[0, 0]).all(2)):
        if (page[y : y + height, x : x + width] == image).all():
            return int(x), int(y)
    raise AssertionError("it is not there")


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_image_and_overlay_stand_side_by_side_at_the_images_own_size(mode) -> None:
    about = explained(mode=mode)
    page = picture(about)
    left, top = position(page, np.asarray(about.image.convert("RGB")))
    beside, same = position(page, overlay(about.image, about.maps["map 0"], about.box))
    assert same == top
    assert beside >= left + 300
    assert page.shape[1] < 2 * 300 + 60


def test_a_small_image_is_enlarged_by_a_whole_number() -> None:
    about = explained(size=(32, 20))
    enlarged = np.asarray(about.image).repeat(12, 0).repeat(12, 1)
    position(picture(about), enlarged)


def test_a_large_photograph_is_reduced_to_4096_pixels_with_its_overlays() -> None:
    page = picture(explained(size=(3000, 100), maps=4))
    assert 3 * 1365 < page.shape[1] < 4500


@pytest.mark.parametrize("maps", [1, 2, 3, 4, 5, 13])
def test_every_map_has_its_panel(maps) -> None:
    about = explained(size=(60, 50), maps=maps)
    page = picture(about)
    scaled = Explained(about.image.resize((300, 250), Image.Resampling.NEAREST), (0, 0, 300, 250), {}, "")
    for values in about.maps.values():
        position(page, overlay(scaled.image, values, scaled.box))


@pytest.mark.parametrize(
    "title", ["a class with a name that is far too long for this picture, " * 5, "", "\U0010fffd" * 90]
)
def test_titles_stay_inside_the_picture_and_off_the_legend(title) -> None:
    page = picture(explained(title=title))
    plain_page = picture(explained(title="x"))
    assert (page[:, -8:] == 255).all()
    legend = slice(page.shape[1] - 175, None)
    assert (page[:40, legend] == plain_page[:40, legend]).all(), "the title runs into the legend"


def test_formulas_and_strange_characters_are_text() -> None:
    assert (picture(explained(title="$x_1$ \x1b[31m")) != picture(explained(title="")))[:40].any()
    picture(explained(title="$ \\frac{"))  # would be an error as a formula


def test_a_sheet_holds_64_and_images_of_any_shape() -> None:
    sheet = Sheet()
    for i in range(70):
        sheet.add(explained(size=[(30, 20), (20, 30), (500, 3), (3, 500)][i % 4]))
    page = sheet.draw("heading")
    assert len(sheet.tiles) == 64
    assert page.shape[1] == 4 * (2 * 144 + 4 + 20) + 20
    one = Sheet()
    one.add(explained())
    assert one.draw("heading").shape[1] < page.shape[1] / 3
