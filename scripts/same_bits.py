"""Whether two versions of vit-train compute the same weights, and word the same errors and configs.

    git worktree add ../before COMMIT
    python scripts/same_bits.py --tree ../before > before.json
    python scripts/same_bits.py --against before.json

Trains six small models on the digits and on 36 generated images, types 60 commands that must fail, and shows
each data config, all through the commands themselves. `--against` prints what differs from a record of the
same machine and exits 1 unless every tensor and every config is equal; of a config, only the module in which
a class lives and the order of the keys may differ. Takes some six minutes on two cores.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

HOUSE = Path(__file__).resolve().parents[1]
FOLDER = (
    "data=imagefolder data.root=images data.img_size=32 data.batch_size=12 augment=medium strategy=one_thread"
)
SMALL = "trainer.epochs=2"
MIXED = "augment.batch.mixup_alpha=0.4 augment.batch.cutmix_alpha=1.0 augment.batch.erase_prob=0.25"
VIT = "model=vit_cifar model.depth=2 model.embed_dim=48 model.num_heads=3"
RUNS = {
    "digits": "trainer.epochs=3",
    "vit": f"{FOLDER} {VIT} {MIXED} trainer.grad_accum_steps=2 trainer.ema_decay=0.9 data.num_workers=2",
    "deit": f"{FOLDER} model=deit_cifar model.depth=2 model.embed_dim=48 model.num_heads=3 optimizer=adamw "
    "objective=distill objective.teacher=runs/vit trainer.ema_decay=0.9 model.drop_path_rate=0.2",
    "swin": f"{FOLDER} model=swin_cifar_w4 model.embed_dim=24 model.depths=[1,2,1] {MIXED} optimizer=muon "
    "trainer.ema_decay=0.9 trainer.grad_accum_steps=3 schedule=plateau",
    "hybrid": f"{FOLDER} model=hybrid_cifar model.embed_dim=48 model.patch_embed.widths=[24,48] "
    f"model.depth=1 model.num_heads=3 {MIXED} optimizer=muon data.sampler=balanced "
    "trainer.grad_clip_norm=0.5",
    "from_vit": f"{FOLDER} {VIT} init_from=runs/vit trainer.freeze=[patch_embed,blocks.0] optimizer=sgd",
}
ERRORS = [
    *(f"vit-train {arguments}" for arguments in (
        "model=swim",
        "optimizer=adamm",
        "experiment=nope",
        "=3",
        "photos",
        "trainer.epochs=[1",
        "model=3",
        "trainer.epoch=3",
        "+trainer.epoch=3",
        "trainer.zzz=3",
        "optimzer.lr=1",
        "lr=1e-3",
        "optimizer.lr=abc trainer.epochs=0 foo=1",
        "optimizer.lr=-1",
        "optimizer.lr=${nope}",
        "trainer.precision=bf17",
        "trainer.compile=1",
        "model=[vit_tiny,vit_small]",
        "model=vit_tiny model.patch_embed.patch_size=3",
        "model.embed_dim=64 model.num_heads=5",
        "model.patch_size=4",
        "data.batch_size=10 trainer.grad_accum_steps=3",
        "schedule.warmup_epochs=50 data.limit=64",
        "data.val_fraction=2",
        "data.num_classes=7",
        "strategy.device=cuda:99",
        "--resume=X",
        "--cfg",
        "--cfg job trainer.epoch=3",
        "summary=true resume=runs/vit",
        "data=imagefolder",
        "data=imagefolder data.root=nowhere",
        "data=imagefolder data.root=empty",
        "data=imagefolder data.root=broken data.img_size=32 model=vit_cifar",
        "data=cifar10 data.root=images",
        "resume=latest run_dir=nowhere",
        "resume=nowhere",
        "resume=images",
        "resume=",
        "resume=runs/vit trainer.epochs=1",
        "resume=runs/vit model=swin_tiny",
        "resume=runs/vit data.batch_size=6",
        "run_dir=runs/digits seed=5",
        "run_dir=images",
        "init_from=nowhere",
        "init_from=runs/digits model=vit_cifar data=imagefolder data.root=images data.img_size=32",
        "objective=distill",
        "objective=distill objective.teacher=nowhere",
        "objective.class_weights=nowhere.yaml",
        "objective.class_weights={zebra:2}",
        "trainer.freeze=[nothing]",
    )),
    "vit-eval",
    "vit-eval nowhere",
    "vit-eval runs/vit data.epoch=3",
    "vit-eval runs/vit data.root=nowhere",
    "vit-predict runs/vit",
    "vit-predict runs/vit nowhere.png",
    "vit-explain runs/vit broken/b/0.png",
    "vit-export runs/vit --format onx",
    "vit-data check nowhere",
]  # fmt: skip


def make_images(folder: Path) -> None:
    """Three classes of smooth pictures of odd sizes, an empty folder, and one without a single image."""
    generator = np.random.default_rng(0)
    for label in "abc":
        (folder / "images" / label).mkdir(parents=True)
        for i in range(12):
            coarse = Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8))
            size = tuple(int(n) for n in generator.integers(20, 60, 2))
            coarse.resize(size, Image.Resampling.BICUBIC).save(folder / "images" / label / f"{i}.png")
    (folder / "empty").mkdir()
    for label in "ab":
        (folder / "broken" / label).mkdir(parents=True)
        (folder / "broken" / label / "0.png").write_bytes(b"not an image")


class Tree:
    """The commands of one checkout, typed in one folder."""

    def __init__(self, tree: Path, folder: Path) -> None:
        with (tree / "pyproject.toml").open("rb") as file:
            self.commands: dict[str, str] = tomllib.load(file)["project"]["scripts"]
        self.folder = folder
        self.environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}

    def type(self, line: str) -> subprocess.CompletedProcess[str]:
        name, *arguments = line.split(" ")
        module, function = self.commands[name].split(":")
        code = f"import sys; sys.argv[0] = {name!r}; from {module} import {function}; sys.exit({function}())"
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )


def record(tree: Path) -> dict[str, dict[str, object]]:
    """What a checkout computes, says and composes."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        make_images(folder)
        typed = Tree(tree.resolve(), folder)
        bits: dict[str, object] = {}
        for name, arguments in tqdm(RUNS.items(), desc="runs"):
            defaults = "" if name == "digits" else f"{SMALL} "
            done = typed.type(f"vit-train run_dir=runs/{name} {defaults}{arguments}")
            if done.returncode != 0:
                raise SystemExit(f"the run {name} failed:\n{done.stderr}")
            bits[name] = hashes(folder / "runs" / name / "checkpoints" / "last")
        errors: dict[str, object] = {}
        for line in tqdm(ERRORS, desc="errors"):
            done = typed.type(line)
            if done.returncode == 0:
                raise SystemExit(f"{line} did not fail:\n{done.stdout}")
            errors[line] = f"exit {done.returncode}\n{done.stdout}{done.stderr}".replace(
                str(folder), "FOLDER"
            )
        names = sorted(path.stem for path in (tree / "configs" / "data").glob("*.yaml"))
        configs = {name: typed.type(f"vit-train data={name} --cfg job").stdout for name in tqdm(names)}
    return {"bits": bits, "errors": errors, "configs": dict(configs)}


def hashes(checkpoint: Path) -> dict[str, str]:
    """File and name of each tensor -> SHA-256 of its type, shape and bytes."""
    found = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            about = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
            found[f"{file.stem}/{name}"] = hashlib.sha256(about + tensor.numpy().tobytes()).hexdigest()
    return found


def compare(before: dict[str, dict[str, object]], now: dict[str, dict[str, object]]) -> bool:
    """Prints what differs; returns whether every tensor and every config is equal."""
    equal = True
    for name, tensors in before["bits"].items():
        ours = now["bits"][name]
        wrong = [key for key in sorted({*tensors, *ours}) if tensors.get(key) != ours.get(key)]
        print(f"bits of {name}: {len(tensors) - len(wrong)} of {len(tensors)} tensors equal", *wrong[:3])
        equal &= not wrong
    for kind in ("configs", "errors"):
        differ = 0
        for name in {**before[kind], **now[kind]}:
            texts = [without_modules(record[kind].get(name, "")) for record in (before, now)]
            same = kind == "configs" and yaml.safe_load(texts[0]) == yaml.safe_load(texts[1])
            if texts[0] != texts[1] and not same:
                differ += 1
                lines = difflib.unified_diff(*(text.splitlines() for text in texts), lineterm="", n=0)
                print(f"--- {name}", *list(lines)[2:], sep="\n")
        print(f"{kind}: {len(before[kind]) - differ} of {len(before[kind])} equal")
        equal &= kind == "errors" or not differ
    return equal


def without_modules(text: object) -> str:
    """vit_train.data.Cifar10 -> Cifar10."""
    return re.sub(r"\bvit_train(\.[a-z_0-9]+)*\.(?=\w+)", "", str(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tree", type=Path, default=HOUSE, help="the checkout to look at; default: this one")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with this record")
    arguments = parser.parse_args()
    now = record(arguments.tree)
    if arguments.against is None:
        print(json.dumps(now, indent=1))
    elif not compare(json.loads(arguments.against.read_text(encoding="utf-8")), now):
        sys.exit(1)


if __name__ == "__main__":
    main()
