"""Checkpoints as training scripts and other libraries save them, made by those libraries themselves.

Each gives its logits here; of a file without a head, its features. Every parameter of the source is moved away from
its start, so that no two tensors can be mixed up unnoticed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shlex
import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from conftest import with_trained_head
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from timm.models.vision_transformer import VisionTransformer as TimmViT
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models import SwinTransformer, VisionTransformer

from vit_train.errors import CheckpointError, ConfigError
from vit_train.layers import PatchEmbed
from vit_train.models import DeiT, Swin, ViT
from vit_train.weights import load_pretrained, read_pretrained

SIZE = {ViT: 32, DeiT: 32, Swin: 64}
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "num_classes": 7}
SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "num_classes": 7}


# ------------------------------------------------------------------------------------------------- the models
def ours(kind, size=None):
    size = size or SIZE[kind]
    embed = {"img_size": size, "in_channels": 3}
    if kind is Swin:
        patches = PatchEmbed(**embed, patch_size=4, embed_dim=16, norm=True, any_size=True)
        return with_trained_head(Swin(patch_embed=patches, mask_padding=False, **SWIN)).eval()
    return with_trained_head(kind(patch_embed=PatchEmbed(**embed, patch_size=8, embed_dim=32), **VIT)).eval()


def moved(model, seed=0, *, by=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * by)
    return model.eval()


def timm_vit(**settings):
    return moved(TimmViT(img_size=32, patch_size=8, **{**VIT, **settings}))


def timm_swin():
    return moved(TimmSwin(img_size=64, patch_size=4, **SWIN))


def timm_deit():
    return moved(timm.models.deit.VisionTransformerDistilled(img_size=32, patch_size=8, **VIT))


def torchvision_vit():
    sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64, "num_classes": 7}
    return moved(VisionTransformer(image_size=32, patch_size=8, **sizes))


def torchvision_swin(**settings):
    sizes = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "num_classes": 7}
    return moved(SwinTransformer(patch_size=[4, 4], window_size=[4, 4], **sizes, **settings))


def hugging_face(name):
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    if name.startswith("Swin"):
        sizes = {**SWIN, "depths": [2, 2], "num_heads": [2, 4], "patch_size": 4, "image_size": 64}
        sizes["num_labels"] = sizes.pop("num_classes")
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        sizes |= {"image_size": 32, "patch_size": 8, "num_labels": 7, "mask_ratio": 0.0}
        sizes |= {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
        sizes["decoder_intermediate_size"] = 32
    # its norms add 1e-12 to a variance and ours 1e-6: that shows where embeddings are as small as at the start
    return moved(kind(kind.config_class(**sizes)), by=0.3)


def lit(**modules):
    """A LightningModule with these, that has taken a step."""
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self, lr, smoothing):
            super().__init__()
            self.save_hyperparameters()
            self.criterion = nn.CrossEntropyLoss(weight=torch.ones(7))
            for name, module in modules.items():
                setattr(self, name, module)

        def training_step(self, batch, _):
            logits = next(iter(modules.values()))(batch[0])
            return self.criterion(getattr(logits, "logits", logits), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), self.hparams.lr)

    return Lit(lr=1e-3, smoothing=0.1)


def fitted(module, file, *, size=32, callbacks=()):
    """The file that Lightning's own trainer saves after two steps."""
    lightning = pytest.importorskip("lightning")
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(images, torch.arange(4))
    off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    quiet = {**dict.fromkeys(off, False), "default_root_dir": file.parent, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_steps=2, callbacks=list(callbacks), **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
    trainer.save_checkpoint(file)
    return module.eval()


# -------------------------------------------------------------------------------------------------- the forms
# Each: the folder it may write to -> what to type, the model that was saved, ours of the same kind, and what the note says.
def reference_script_of_torchvision(folder):
    """references/classification/train.py, whose ExponentialMovingAverage is an AveragedModel."""
    model = torchvision_vit()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    ema.update_parameters(moved(copy.deepcopy(model), 1))
    ema.update_parameters(moved(copy.deepcopy(model), 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    warmup, rest = (
        kind(optimizer) for kind in (torch.optim.lr_scheduler.LinearLR, torch.optim.lr_scheduler.ConstantLR)
    )
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, rest], [1])
    saved = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
    }
    saved |= {"epoch": 3, "args": argparse.Namespace(lr=0.1, sync_bn=True), "model_ema": ema.state_dict()}
    torch.save({**saved, "scaler": torch.amp.GradScaler("cpu").state_dict()}, folder / "checkpoint.pth")
    return (
        folder / "checkpoint.pth",
        ema.module.eval(),
        ViT,
        "key 'model_ema', prefix 'module.', torchvision's names",
    )


def legacy_tar_of_data_parallel(folder):
    model = nn.DataParallel(torchvision_swin())
    saved = {"epoch": 9, "arch": "swin", "best_acc1": torch.tensor(71.3), "state_dict": model.state_dict()}
    torch.save(saved, folder / "model_best.pth.tar", _use_new_zipfile_serialization=False)
    return (
        folder / "model_best.pth.tar",
        model.module,
        Swin,
        "key 'state_dict', prefix 'module.', torchvision's names",
    )


def train_script_of_timm(folder):
    model = timm_vit()
    ema = ModelEmaV3(model, decay=0.5)
    optimizer = torch.optim.AdamW(model.parameters())
    ema.update(moved(copy.deepcopy(model), 1))
    args = argparse.Namespace(model="vit")
    CheckpointSaver(model, optimizer, args, ema, checkpoint_dir=str(folder)).save_checkpoint(0, 50.0)
    return folder / "last.pth.tar", ema.module, ViT, "key 'state_dict_ema', timm's names"


def under_net(folder):
    model = timm_swin()
    torch.save({"net": model.state_dict(), "acc": 91.0, "epoch": 3}, folder / "ckpt.pth")
    return folder / "ckpt.pth", model, Swin, "key 'net', timm's names"


def under_weights(folder):
    model = timm_deit()
    torch.save({"weights": model.state_dict(), "classes": list("abcdefg")}, folder / "w.pt")
    return folder / "w.pt", model, DeiT, "key 'weights', timm's names"


def compiled(folder):
    model = torch.compile(timm_vit())
    torch.save(model.state_dict(), folder / "w.pth")
    return folder / "w.pth", model._orig_mod, ViT, "prefix '_orig_mod.', timm's names"


def blocks_compiled_one_by_one(folder):
    model = timm_swin()
    plain = copy.deepcopy(model)
    for stage in model.layers:
        stage.blocks = nn.Sequential(*(torch.compile(block) for block in stage.blocks))
    assert any("._orig_mod." in name for name in model.state_dict())
    torch.save({"model": model.state_dict()}, folder / "w.pth")
    return folder / "w.pth", plain, Swin, "key 'model', timm's names"


def compiled_in_data_parallel(folder):
    model = nn.DataParallel(torch.compile(torchvision_vit()))
    torch.save({"params": model.state_dict()}, folder / "w.pth")
    return (
        folder / "w.pth",
        model.module._orig_mod,
        ViT,
        "key 'params', prefix 'module._orig_mod.', torchvision's names",
    )


def nested_twice(folder):
    model = torchvision_swin()
    torch.save({"state": {"model": model.state_dict(), "step": 7}, "config": {"lr": 0.1}}, folder / "w.pth")
    return folder / "w.pth", model, Swin, "key 'state.model', torchvision's names"


def wrapped_and_other_modules_beside(folder):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.projector = timm_vit(), nn.Linear(32, 16)
            self.register_buffer("queue", torch.randn(16, 64))

    net = nn.DataParallel(Net())
    save_file(net.state_dict(), folder / "w.safetensors")
    return folder / "w.safetensors", net.module.encoder, ViT, "prefix 'module.encoder.', timm's names"


def dino(folder):
    def wrapped(seed):
        net = nn.Module()
        net.backbone, net.head = (
            moved(timm_vit(num_classes=0), seed),
            nn.Sequential(nn.Linear(32, 8), nn.GELU()),
        )
        return net

    student, teacher = nn.DataParallel(wrapped(1)), wrapped(2)
    torch.save(
        {"student": student.state_dict(), "teacher": teacher.state_dict(), "epoch": 99}, folder / "w.pth"
    )
    return folder / "w.pth", teacher.backbone, ViT, "key 'teacher', prefix 'backbone.', timm's names"


def lightning_module(folder):
    module = fitted(lit(model=timm_vit()), folder / "last.ckpt")
    return folder / "last.ckpt", module.model, ViT, "key 'state_dict', prefix 'model.', timm's names"


def lightning_with_averages(folder):
    lightning = pytest.importorskip("lightning")
    averaging = lightning.pytorch.callbacks.EMAWeightAveraging(decay=0.5)
    module = fitted(lit(net=torchvision_swin()), folder / "last.ckpt", size=64, callbacks=[averaging])
    return folder / "last.ckpt", module.net, Swin, "key 'state_dict', prefix 'net.', torchvision's names"


def lightning_distillation(folder):
    teacher = timm_vit(depth=3).requires_grad_(False)
    module = fitted(lit(student=timm_vit(), teacher=teacher), folder / "last.ckpt")
    return folder / "last.ckpt", module.student, ViT, "key 'state_dict', prefix 'student.', timm's names"


def lightning_around_hugging_face(folder):
    module = fitted(lit(model=hugging_face("ViTForImageClassification")), folder / "last.ckpt")
    return (
        folder / "last.ckpt",
        module.model,
        ViT,
        "key 'state_dict', prefix 'model.vit.', Hugging Face's names",
    )


def save_pretrained_vit(folder):
    model = hugging_face("ViTForImageClassification")
    model.save_pretrained(folder / "vit")
    return folder / "vit", model, ViT, "prefix 'vit.', Hugging Face's names"


def save_pretrained_deit_in_shards(folder):
    model = hugging_face("DeiTForImageClassificationWithTeacher")
    model.save_pretrained(folder / "deit", max_shard_size="20KB")
    assert len(list((folder / "deit").glob("model-*.safetensors"))) > 2
    return folder / "deit", model, DeiT, "prefix 'deit.', Hugging Face's names"


def save_pretrained_swin(folder):
    model = hugging_face("SwinForImageClassification")
    model.save_pretrained(folder / "swin")
    return folder / "swin", model, Swin, "prefix 'swin.', Hugging Face's names"


def pickled_shards(folder):
    model = hugging_face("SwinForImageClassification")
    hub = pytest.importorskip("huggingface_hub")  # which transformers brings
    (folder / "swin").mkdir()
    hub.save_torch_model(model, folder / "swin", safe_serialization=False, max_shard_size="20KB")
    assert (folder / "swin" / "pytorch_model.bin.index.json").is_file()
    return folder / "swin", model, Swin, "prefix 'swin.', Hugging Face's names"


def names_in_memory(folder):
    """Since version 5 the modules have other names than the files of save_pretrained."""
    model = hugging_face("SwinForImageClassification")
    torch.save({"model_state_dict": model.state_dict()}, folder / "w.bin")
    return folder / "w.bin", model, Swin, "key 'model_state_dict', prefix 'swin.', Hugging Face's names"


def backbone_with_pooler(folder):
    model = hugging_face("ViTModel")
    (folder / "vit").mkdir()
    torch.save(model.state_dict(), folder / "vit" / "pytorch_model.bin")
    return folder / "vit", model, ViT, "(Hugging Face's names)"


def backbone_of_deit(folder):
    model = hugging_face("DeiTModel")
    model.save_pretrained(folder / "deit")
    return folder / "deit", model, DeiT, "(Hugging Face's names)"


def backbone_of_swin(folder):
    model = hugging_face("SwinModel")
    model.save_pretrained(folder / "swin")
    return folder / "swin" / "model.safetensors", model, Swin, "(Hugging Face's names)"


def masked_autoencoder(folder):
    model = hugging_face("ViTMAEForPreTraining")
    model.save_pretrained(folder / "mae")
    return folder / "mae", model.vit, ViT, "prefix 'vit.', Hugging Face's names"


FORMS = [
    reference_script_of_torchvision,
    legacy_tar_of_data_parallel,
    train_script_of_timm,
    under_net,
    under_weights,
    compiled,
    blocks_compiled_one_by_one,
    compiled_in_data_parallel,
    nested_twice,
    wrapped_and_other_modules_beside,
    dino,
    lightning_module,
    lightning_with_averages,
    lightning_distillation,
    lightning_around_hugging_face,
    save_pretrained_vit,
    save_pretrained_deit_in_shards,
    save_pretrained_swin,
    pickled_shards,
    names_in_memory,
    backbone_with_pooler,
    backbone_of_deit,
    backbone_of_swin,
    masked_autoencoder,
]
PASSED_OVER = {
    reference_script_of_torchvision: ["n_averaged"],
    wrapped_and_other_modules_beside: ["module.projector.bias", "module.projector.weight", "module.queue"],
    dino: ["head.0.bias", "head.0.weight"],
    lightning_module: ["criterion.weight"],
    lightning_with_averages: ["criterion.weight"],
    lightning_around_hugging_face: ["criterion.weight"],
    backbone_with_pooler: ["pooler.dense.bias", "pooler.dense.weight"],
    backbone_of_deit: ["pooler.dense.bias", "pooler.dense.weight"],
}


def answers(model, images, *, features):
    """Logits (B, K), or the features (B, N, D) of theirs and ours in one shape."""
    if not features:
        out = model(images)
        return getattr(out, "logits", out)
    if hasattr(model, "forward_features"):
        return model.forward_features(images).flatten(1, -2)
    order = {"noise": torch.arange(16.0).expand(len(images), -1)} if "MAE" in type(model).__name__ else {}
    return model(images, **order).last_hidden_state


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_what_others_saved_gives_their_logits(form, tmp_path, record_property):
    source, theirs, kind, says = form(tmp_path)
    model = ours(kind)
    report = load_pretrained(model, str(source))
    headless = not any("head" in name or "classifier" in name for name, _ in theirs.named_parameters())
    images = torch.randn(3, 3, SIZE[kind], SIZE[kind], generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = answers(theirs, images, features=headless)
        difference = (answers(model, images, features=headless) - expected).abs().max().item()
    record_property("difference", f"{difference:.1e} of {expected.abs().max().item():.1f}")
    assert expected.std() > 0.1
    assert difference <= 1e-5 * max(1.0, expected.abs().max().item())
    heads = [name for name in model.state_dict() if name.startswith("head")]
    assert report.made_anew == (heads if headless else [])
    assert not report.left_over
    assert not report.resized
    assert says in str(report)
    if form in (lightning_distillation, masked_autoencoder):
        assert {name.split(".")[0] for name in report.passed_over} <= {"teacher", "criterion", "decoder"}
        assert report.passed_over
    else:
        assert sorted(report.passed_over) == PASSED_OVER.get(form, [])


# --------------------------------------------------------------------------------------------------- refused
def one_line(source, model=None):
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        load_pretrained(model or ours(ViT), str(source)) if model else read_pretrained(str(source))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_other_networks_are_told_by_what_they_hold(tmp_path):
    model = torchvision.models.mobilenet_v2()  # which has a features.0.0.weight
    torch.save({"state_dict": model.state_dict(), "epoch": 3, "arch": "mobilenet_v2"}, tmp_path / "w.pth")
    line = one_line(tmp_path / "w.pth", ours(ViT))
    assert "its keys: 'state_dict', 'epoch', 'arch'; its tensors: features.0.0.weight (32, 3, 3, 3), " in line
    assert "features.0.1.weight (32,), features.0.1.bias (32,) ..." in line
    assert "type the model= they are of" in line


def test_a_file_without_tensors_names_its_keys(tmp_path):
    saved = {"epoch": 3, "optimizer": {"state": {"exp_avg": torch.ones(3)}}}
    saved["itself"] = saved
    torch.save(saved, tmp_path / "w.pth")
    assert "holds no weights (its keys: 'epoch', 'optimizer', 'itself')" in one_line(tmp_path / "w.pth")


def test_swin_v2_of_hugging_face_is_named(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    model = transformers.Swinv2ForImageClassification(transformers.Swinv2Config(**sizes, window_size=4))
    model.save_pretrained(tmp_path / "w")
    assert "Swin V2" in one_line(tmp_path / "w")


def test_a_deit_with_one_head_of_two_says_so(tmp_path):
    hugging_face("DeiTForImageClassification").save_pretrained(tmp_path / "w")
    assert "head_dist.weight is missing" in one_line(tmp_path / "w", ours(DeiT))


def test_objects_in_what_lightning_saved_are_refused_with_what_to_type(tmp_path):
    module = lit(model=timm_vit())
    module.hparams["root"] = tmp_path
    fitted(module, tmp_path / "w.ckpt")
    line = one_line(tmp_path / "w.ckpt")
    typed = shlex.split(line[line.index("python -c") :])
    subprocess.run([sys.executable, *typed[1:]], cwd=tmp_path, check=True)
    assert load_pretrained(ours(ViT), str(tmp_path / "weights.pth")).passed_over == ("criterion.weight",)


def sharded(folder):
    tensors = dict(timm_vit().state_dict())
    half = len(tensors) // 2
    parts = {
        "a.safetensors": dict(list(tensors.items())[:half]),
        "b.safetensors": dict(list(tensors.items())[half:]),
    }
    for file, part in parts.items():
        save_file(part, folder / file)
    return {name: file for file, part in parts.items() for name in part}


def outside(folder, files):
    (folder / "a.safetensors").rename(folder.parent / "a.safetensors")
    return {name: file.replace("a.", "../a.") for name, file in files.items()}


def absolute(folder, files):
    return {name: str(folder / file) for name, file in files.items()}


def missing(folder, files):
    (folder / "b.safetensors").unlink()
    return files


def pipe(folder, files):
    (folder / "b.safetensors").unlink()
    os.mkfifo(folder / "b.safetensors")
    os.open(folder / "b.safetensors", os.O_RDWR)  # so that who opens it does not wait for ever
    return files


def cut_short(folder, files):
    data = (folder / "b.safetensors").read_bytes()
    (folder / "b.safetensors").write_bytes(data[:-9])
    return files


SHARDS = {
    "whole": (lambda folder, files: files, None),
    "outside": (outside, "'../a.safetensors', which is not a file of weights beside it"),
    "absolute": (absolute, "which is not a file of weights beside it"),
    "itself": (
        lambda _, files: dict.fromkeys(files, "model.safetensors.index.json"),
        "not a file of weights",
    ),
    "missing": (missing, "b.safetensors, which is not a file"),
    "a pipe": (pipe, "b.safetensors, which is not a file"),
    "cut short": (cut_short, "b.safetensors is not a whole safetensors file"),
    "a tensor too many": (lambda _, files: {**files, "more": "a.safetensors"}, "not the index of the files"),
    "numbers": (lambda _, files: dict.fromkeys(files, 3), "not the index of the files"),
    "a list": (lambda _, files: list(files), "not the index of the files"),
}


@pytest.mark.parametrize("case", SHARDS)
def test_shards_are_files_of_their_own_folder(case, tmp_path):
    (tmp_path / "w").mkdir()
    change, says = SHARDS[case]
    index = {"metadata": {}, "weight_map": change(tmp_path / "w", sharded(tmp_path / "w"))}
    (tmp_path / "w" / "model.safetensors.index.json").write_text(json.dumps(index))
    if says is None:
        assert len(load_pretrained(ours(ViT), str(tmp_path / "w")).loaded) == len(timm_vit().state_dict())
    else:
        assert says in one_line(tmp_path / "w")


@pytest.mark.parametrize("damage", ["not finite", "few that claim to be many"])
def test_only_what_is_taken_has_to_be_sound(damage, tmp_path):
    wrong = (
        torch.full((32,), float("nan")) if damage == "not finite" else torch.ones(1).expand(300_000, 300_000)
    )
    state = {f"model.{name}": tensor for name, tensor in timm_vit().state_dict().items()}
    torch.save({"state_dict": {**state, "criterion.weight": wrong}}, tmp_path / "beside.ckpt")
    assert load_pretrained(ours(ViT), str(tmp_path / "beside.ckpt")).passed_over == ("criterion.weight",)
    torch.save({"state_dict": {**state, "model.norm.weight": wrong}}, tmp_path / "inside.ckpt")
    assert "norm.weight" in one_line(tmp_path / "inside.ckpt")


def test_a_model_of_your_own_around_ours_is_taken_whole(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = ours(ViT), nn.Linear(7, 3)

    saved, loaded = moved(Twice()), Twice()
    torch.save(nn.DataParallel(saved).state_dict(), tmp_path / "w.pth")
    report = load_pretrained(loaded, str(tmp_path / "w.pth"))
    assert not report.passed_over
    assert all(torch.equal(a, b) for a, b in zip(saved.state_dict().values(), loaded.state_dict().values()))
    assert load_pretrained(ours(ViT), str(tmp_path / "w.pth")).passed_over == (
        "module.decoder.bias",
        "module.decoder.weight",
    )


def test_a_checkpoint_of_ours_without_its_manifest_is_not_taken_for_weights_of_others(tmp_path):
    save_file(timm_vit().state_dict(), tmp_path / "model.safetensors")
    assert load_pretrained(ours(ViT), str(tmp_path)).loaded
    (tmp_path / "state.json").write_text("{}")
    assert "holds no checkpoint" in one_line(tmp_path)
