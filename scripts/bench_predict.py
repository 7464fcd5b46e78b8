"""How fast vit-predict is beside evaluation: the same model, images, batches and workers.

    python scripts/bench_predict.py [--images 10000] [--rounds 3] [--batch-size 128] [--num-workers N]
                                    [--root FOLDER] [--device NAME] [model.key=value ...]

Writes 32-pixel JPEG files into a temporary folder (or takes those of FOLDER/test/<class>/), makes a vit_cifar
of random weights, and in one process alternates

    evaluate   vit_train.training.evaluation.evaluate over a loader: loss, hits, confusion matrix
    predict    vit_train.inference.prediction.predict over the files' names, written as JSON Lines to a file

Prints medians over the rounds in images per second, and the median of the ratios of neighbouring rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from vit_train.config.check import config_dir
from vit_train.construct import make
from vit_train.data import ImageFolder
from vit_train.data.image_data import num_cores
from vit_train.inference.prediction import predict
from vit_train.inference.trained import Trained
from vit_train.report.predictions import JsonLines
from vit_train.training.evaluation import evaluate
from vit_train.training.objective import CrossEntropy
from vit_train.training.strategy import SingleDevice


def write_images(root: Path, images: int) -> None:
    """Smooth random JPEG files in root/test/<class>/ and, as a folder needs them, some in root/train."""
    generator = np.random.default_rng(0)
    for c in range(10):
        for split, count in (("train", 2), ("test", images // 10)):
            folder = root / split / f"class_{c}"
            folder.mkdir(parents=True)
            for i in range(count):
                coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                image = Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC)
                image.save(folder / f"{i:05d}.jpg", quality=95)


def trained_model(device: torch.device, data: ImageFolder, overrides: list[str]) -> Trained:
    """A vit_cifar of random weights, as if it had been loaded."""
    shape = (f"data.num_classes={data.num_classes}", f"data.img_size={data.img_size}")
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("train", overrides=["data=imagefolder", "model=vit_cifar", *shape, *overrides])
    node = OmegaConf.to_container(config.model, resolve=True)
    model = make(node, key="model", allow=("vit_train",))
    return Trained(
        model=model.to(device).eval(),
        class_names=data.class_names,
        mean=data.mean,
        std=data.std,
        img_size=data.img_size,
        in_channels=3,
        resize="crop",
        background=(255, 255, 255),
        value_range=None,
        config={"trainer": {"precision": "auto"}},
        path=Path(),
        weights="raw",
        step=0,
    )


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--num-workers", type=int, default=num_cores())
    parser.add_argument("--root", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("overrides", nargs="*", metavar="model.key=value")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.root or Path(temporary) / "images"
        if arguments.root is None:
            write_images(root, arguments.images)
        print(json.dumps(measure(root, Path(temporary) / "answers.jsonl", arguments), indent=1))


def measure(root: Path, answers: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """Images per second of both, and their ratio."""
    strategy = SingleDevice(device=arguments.device)
    data = ImageFolder(
        root=str(root), batch_size=arguments.batch_size, num_workers=arguments.num_workers, img_size=32
    )
    data.setup(device=strategy.device, rank=0, world_size=1)
    trained = trained_model(strategy.device, data, arguments.overrides)
    names = [data.source("test", i) for i in range(data.sizes["test"])]
    normalize, precision = trained.batch_transform(), trained.precision()

    def run_evaluate() -> None:
        evaluate(
            trained.model,
            data.loader("test"),
            objective=CrossEntropy(data.class_names, [1] * data.num_classes),
            transform=normalize,
            strategy=strategy,
            precision=precision,
            num_classes=data.num_classes,
        )

    def run_predict() -> None:
        batches = predict(
            trained, names, top_k=5, batch_size=arguments.batch_size, num_workers=arguments.num_workers
        )
        format_ = JsonLines()
        with answers.open("w") as file:
            for predictions in batches:
                file.write(format_.text(predictions))
                file.flush()

    def images_per_second(work: Callable[[], None]) -> float:
        start = time.perf_counter()
        work()
        return len(names) / (time.perf_counter() - start)

    with torch.inference_mode():  # the first batch is slower than the others
        trained.model(
            torch.zeros(arguments.batch_size, 3, data.img_size, data.img_size, device=strategy.device)
        )
    rounds = [
        (images_per_second(run_evaluate), images_per_second(run_predict)) for _ in range(arguments.rounds)
    ]
    return {
        "device": strategy.describe(),
        "precision": precision,
        "images": len(names),
        "batch_size": arguments.batch_size,
        "num_workers": arguments.num_workers,
        "evaluate_images_per_second": round(statistics.median(e for e, _ in rounds), 1),
        "predict_images_per_second": round(statistics.median(p for _, p in rounds), 1),
        "predict_over_evaluate": round(statistics.median(p / e for e, p in rounds), 3),
        "rounds": [[round(e, 1), round(p, 1)] for e, p in rounds],
    }


if __name__ == "__main__":
    main()
