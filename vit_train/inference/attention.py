"""Where a trained model looks: maps over the picture that say which parts of it decide.

Attention rollout: "Quantifying Attention Flow in Transformers" (Abnar and Zuidema 2020). Grad-CAM: "Visual
Explanations from Deep Networks via Gradient-based Localization" (Selvaraju et al. 2017). Everything is read
off the model's own modules in fp32 and in evaluation mode, and changes nothing: not the mode, gradients or
buffers of the model, nor a random state.

Shapes: B batch, C H W image, h w grid of patches, N = h * w patches + prefix tokens, A attention heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_train.models import ResNet, Swin, ViT

Method = Literal["rollout", "attention", "gradcam"]
NAMES: dict[Method, str] = {
    "rollout": "attention rollout",
    "attention": "last attention",
    "gradcam": "Grad-CAM",
}


@dataclass(frozen=True)
class Maps:
    """What `explain` found; larger is more.

    Attributes:
        whole: (B, h, w), not negative; attention sums to 1 over the patches, Grad-CAM has no unit.
        parts: what it is made of, (B, h, w) by name: the heads of the last layer, or the stages of Swin.
    """

    whole: Tensor
    parts: dict[str, Tensor]


def methods(model: nn.Module) -> tuple[Method, ...]:
    """What can be drawn of a model, the best first; nothing for a family unknown here.

    Attention of Swin stays inside its windows, and no token stands for the result. Grad-CAM needs places that
    keep their own content up to the head, which the tokens of a ViT do not: in tiny ones that had to read one
    planted patch it mostly missed that patch, which rollout found in every image.
    """
    if isinstance(model, ViT) and len(model.blocks):
        tells = all(hasattr(block.attn, "weights") for block in model.blocks)  # a subclass may have others
        return ("rollout", "attention") if tells else ()
    return ("gradcam",) if isinstance(model, Swin | ResNet) else ()


def explain(model: nn.Module, images: Tensor, classes: Tensor, *, method: Method) -> Maps:
    """The maps of a batch (B, C, H, W), by a method that `methods` knows for the model.

    Only Grad-CAM depends on the classes, (B,) ids.
    """
    device = images.device
    with unchanged(model), torch.autocast(device.type, enabled=False):
        if method == "gradcam":
            assert isinstance(model, Swin | ResNet)
            return gradcam(model, images.float(), classes)
        assert isinstance(model, ViT)
        if method == "rollout":
            return Maps(_of_patches(model, rollout(model, images.float())), {})
        seen: list[Tensor] = []
        each_attention(model, images.float(), blocks=model.blocks[-1:], use=seen.append)
        heads = _of_patches(model, seen[0]).unbind(1)
        parts = {f"head {i + 1}": head for i, head in enumerate(heads)}
        return Maps(_of_patches(model, seen[0].mean(1)), parts)


@torch.no_grad()
def each_attention(
    model: ViT, images: Tensor, *, blocks: nn.ModuleList, use: Callable[[Tensor], None]
) -> None:
    """Shows the attention of blocks, first to last, and keeps none: all together can take gigabytes.

    `use` gets (B, A, N, N) of each; rows are queries and sum to 1.
    """

    def look(attn: nn.Module, inputs: tuple[Tensor]) -> None:
        use(attn.weights(*inputs))  # type: ignore[operator]

    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.attn.register_forward_pre_hook(look))  # type: ignore[union-attr]
        model.forward(images)  # not a call of the model, which torch.compile may have replaced


def rollout(model: ViT, images: Tensor) -> Tensor:
    """How much of each input token is in each token after the last block: (B, N, N), rows sum to 1.

    Each block mixes its tokens by the mean of its heads, and by as much again keeps them where they are (the
    residual connection): 0.5 A + 0.5 I. The product over the blocks is what reaches the end.
    """
    flow: Tensor | None = None

    def mix(weights: Tensor) -> None:
        nonlocal flow
        identity = torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device)
        block = 0.5 * weights.mean(1) + 0.5 * identity
        flow = block if flow is None else block @ flow

    each_attention(model, images, blocks=model.blocks, use=mix)
    assert flow is not None, "a model without blocks, which `methods` knows nothing for"
    return flow


def _of_patches(model: ViT, flow: Tensor) -> Tensor:
    """The rows the head of the model reads, as shares of the patches: (..., N, N) -> (..., h, w).

    Those rows are the class token's, with DeiT's distillation token the mean of both, without such tokens the
    mean over all.
    """
    prefix = len(model.prefix_tokens())
    rows = flow[..., :prefix, :] if prefix else flow
    patches = rows.mean(-2)[..., prefix:]
    shares = patches / patches.sum(-1, keepdim=True)
    return shares.unflatten(-1, model.patch_embed.grid_size)


def gradcam(model: Swin | ResNet, images: Tensor, classes: Tensor) -> Maps:
    """The class activation map of each stage: ReLU of the channels weighted by the class's mean gradient.

    All have the size of the images. Each stage is scaled to a maximum of 1; the whole is their mean. The last
    stage is taken after the final norm, where its map is an exact sum of the logit. Of a ResNet it is the
    last group alone.
    """
    seen: list[Tensor] = []
    places = (*model.layers[:-1], model.norm) if isinstance(model, Swin) else (model.groups[-1],)
    with ExitStack() as hooks, torch.enable_grad():
        for stage in places:
            hooks.enter_context(stage.register_forward_hook(lambda _, __, output: seen.append(output)))
        # the images ask for gradients, so that averaged weights, which do not, are differentiated too
        logits = model.forward(images.detach().requires_grad_())
        score = logits.gather(1, classes[:, None]).sum()
        gradients = torch.autograd.grad(score, seen)  # leaves .grad of the parameters alone
    if isinstance(model, ResNet):
        found = _activation_map(*(tensor.detach().movedim(1, -1) for tensor in (seen[0], gradients[0])))
        return Maps(F.interpolate(found[:, None], size=images.shape[-2:], mode="bilinear")[:, 0], {})
    stages = {
        f"stage {i + 1}": _of_image(_activation_map(activation.detach(), gradient), model, images, stage=i)
        for i, (activation, gradient) in enumerate(zip(seen, gradients))
    }
    return Maps(torch.stack(list(stages.values())).mean(0), stages)


def _activation_map(activation: Tensor, gradient: Tensor) -> Tensor:
    """(B, h, w, C) and the gradient there -> (B, h, w), scaled to a maximum of 1 where it is not all 0."""
    found = (gradient.mean((1, 2), keepdim=True) * activation).sum(-1).relu()
    return found / found.amax((1, 2), keepdim=True).clamp_min(torch.finfo(found.dtype).tiny)


def _of_image(found: Tensor, model: Swin, images: Tensor, *, stage: int) -> Tensor:
    """The map of one stage at the size of the images, (B, h, w) -> (B, H, W).

    Maps of an odd size were padded at the right and the bottom: they reach beyond the image.
    """
    stride: int = model.patch_embed.patch_size * 2**stage
    reach = [side * stride for side in found.shape[-2:]]
    large = F.interpolate(found[:, None], size=reach, mode="bilinear")[:, 0]
    return large[:, : images.shape[-2], : images.shape[-1]]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module has the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
