"""configs/data and configs/augment hold exactly what the constructors take."""

from pathlib import Path

import pytest
import torch
import yaml
from conftest import compose

from vit_train import construct
from vit_train.config.check import check_config, plain
from vit_train.data import Cifar10
from vit_train.data.transforms.batch_transforms import Normalize, auto_crop_scale
from vit_train.runs.resume import flat
from vit_train.runs.stored import STORED_CODE

CONFIGS = Path(__file__).parents[2] / "configs"
DATA = sorted(path.stem for path in (CONFIGS / "data").glob("*.yaml"))
AUGMENT = sorted(path.stem for path in (CONFIGS / "augment").glob("*.yaml"))


def load(group, name):
    return yaml.safe_load((CONFIGS / group / f"{name}.yaml").read_text())


def data_node(name, augment):
    """The data node as Hydra composes it for models with patches of 16 pixels."""
    config = plain(compose(f"data={name}", f"augment={augment}", "model=vit_tiny", "seed=5"))
    node, chosen = config["data"], config["augment"]
    assert node["seed"] == 5
    assert node["sample_transform"] == chosen["sample"]
    assert node["repeats"] == chosen["repeats"]
    assert node.get("patch_size", 16) == 16
    return node


def augment_nodes(name):
    """Both nodes of an augmentation, with theirs resolved."""
    nodes = load("augment", name)
    if "defaults" in nodes:
        assert nodes.pop("defaults") == ["light", "_self_"]
        light = load("augment", "light")
        nodes = {**light, "batch": {**light["batch"], **nodes["batch"]}}
    if "seed" in nodes["batch"]:
        assert (nodes["batch"]["seed"], nodes["batch"]["num_classes"]) == ("${seed}", "${data.num_classes}")
        nodes["batch"] |= {"seed": 0, "num_classes": 10}
    return nodes


def test_the_groups_are_complete():
    assert DATA == ["cifar10", "cifar100", "cifar10_folder", "digits", "imagefolder"]
    assert AUGMENT == ["deit", "light", "medium", "none", "photo", "shift"]


@pytest.mark.parametrize("name", DATA)
def test_a_data_node_is_its_constructor(name):
    node = data_node(name, "light")
    assert construct.check(node, key="data") == []
    parameters = construct.parameters(construct.locate(node["_target_"]))
    if name == "cifar10_folder":  # a recipe over another module, see below; its size is given
        assert set(node) - {"_target_"} == set(parameters) - {"patch_size"}
        return
    assert set(node) - {"_target_"} == set(parameters)
    for key in set(node) - {"_target_", "seed", "sample_transform", "repeats", "patch_size"}:
        default = parameters[key].default
        assert node[key] == (list(default) if isinstance(default, tuple) else default), key


@pytest.mark.parametrize("name", DATA)
def test_a_data_config_brings_its_recipe(name):
    entries = load("data", name)["defaults"]
    entries = load("data", "cifar10")["defaults"] if "cifar10" in entries else entries
    defaults = {key: value for entry in entries if isinstance(entry, dict) for key, value in entry.items()}
    chosen = {key.removeprefix("override /").split("@")[0]: value for key, value in defaults.items()}
    assert set(chosen) >= {"model", "augment", "trainer"}
    assert chosen["augment"] in AUGMENT


@pytest.mark.parametrize("others", [(), ("model=swin_cifar", "seed=3"), ("experiment=swin_cifar_tutorial",)])
def test_cifar10_as_a_folder_has_everything_from_cifar10_but_where_it_lies(others):
    def composed(choice):
        cfg = compose(*others, f"data={choice}")
        check_config(cfg)
        return flat(plain(cfg))

    there, here = composed("cifar10"), composed("cifar10_folder")
    differing = {key: here.get(key) for key in {*here, *there} if here.get(key) != there.get(key)}
    tutorial = bool(others) and others[0].startswith("experiment")  # which normalises in its own way
    constants = {"data.mean": list(Cifar10.default_mean), "data.std": list(Cifar10.default_std)}
    assert differing == {
        "data._target_": "vit_train.data.ImageFolder",
        "data.root": None,
        "data.resize": "crop",
        "data.background": [255, 255, 255],
        "data.on_bad_image": "error",
        **({} if tutorial else constants),
    }


@pytest.mark.parametrize("name", AUGMENT)
def test_every_argument_of_an_augmentation_is_a_key(name):
    for node in augment_nodes(name).values():
        if isinstance(node, dict):
            parameters = construct.parameters(construct.locate(node["_target_"])).values()
            keys = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
            assert set(node) - {"_target_", "_partial_"} == keys


@pytest.mark.parametrize("name", AUGMENT)
def test_an_augment_node_builds_and_trains_on_digits(name):
    nodes = augment_nodes(name)
    assert construct.check(nodes, key="augment") == []
    if name == "photo":
        nodes["batch"]["crop_scale"] = auto_crop_scale(8)
    data = construct.make(data_node("digits", name))
    data.setup(device=torch.device("cpu"), rank=0, world_size=1)
    transform = construct.make(nodes)["batch"](data.mean, data.std)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for step, batch in enumerate(data.loader("train")):
        images, targets = transform(batch, 0, step)
        assert images.shape == (64, 1, 8, 8)
        assert abs(float(images.mean())) < 0.6
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), targets).backward()
        optimizer.step()
    examples = data.examples("test", 360)
    images = Normalize(data.mean, data.std).normalize(examples.images)
    recognised = (model(images).argmax(1) == examples.targets).float().mean()
    assert recognised > 0.3, "an epoch taught a linear model nothing"


@pytest.mark.parametrize(
    "target",
    [
        "vit_train.inference.download.download",
        "vit_train.data.folder.pool.each_file",
        "vit_train.data.folder.check.check_folder",
    ],
)
def test_a_stored_run_cannot_fetch_urls_or_start_processes(target):
    for group in ("data", "augment"):
        assert construct.foreign_code({"_target_": target}, STORED_CODE[group], group) != []


def test_a_stored_run_can_name_what_configs_do():
    for group, names in (("data", DATA), ("augment", AUGMENT)):
        for name in names:
            assert construct.foreign_code(load(group, name), STORED_CODE[group], group) == []
