"""Where the values of the recipe come from, as the summary says it."""

import pytest

from vit_train.config.check import config_dir
from vit_train.config.origins import origins

CHOICES = {
    "model": "vit_cifar",
    "augment": "light",
    "schedule": "cosine",
    "data": "cifar10",
    "trainer": "cifar",
}


@pytest.mark.parametrize(
    ("typed", "key", "says"),
    [
        (["data=cifar10"], "augment", "augment=light, brought by data=cifar10"),
        (["data=cifar10", "augment=light"], "augment", "augment=light, command line"),
        (
            ["augment=light", "augment.batch.cutmix_alpha=1.0"],
            "augment",
            "augment=light, command line, augment.batch.cutmix_alpha typed",
        ),
        (["model=vit_cifar"], "model", "model=vit_cifar, command line"),
        (["data.batch_size=7"], "data.batch_size", "command line"),
        (["++trainer.epochs=7"], "trainer.epochs", "command line"),
        (["trainer=cifar"], "trainer.epochs", "trainer=cifar, command line"),
        ([], "schedule", "schedule=cosine"),
    ],
)
def test_a_value_names_what_it_comes_from(typed, key, says):
    assert origins(typed, CHOICES, [config_dir()], stored=False)[key] == says


def test_a_continuation_takes_what_was_not_typed_from_the_run():
    found = origins(["trainer.epochs=9"], CHOICES, [config_dir()], stored=True)
    assert (found["trainer.epochs"], found["augment"], found["data"]) == (
        "command line",
        "as stored",
        "as stored",
    )
