"""Teachers of all origins: the same logits as their own library's, the classes by name, one line where not."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
import torchvision
from conftest import TINY, environment, load_trained, vit_train_here, with_trained_head
from torch import Tensor, nn

from vit_train.errors import CheckpointError, ConfigError, DataError
from vit_train.inference.teacher import Found, Teacher, match_classes, read_teacher

CPU = torch.device("cpu")
NAMES = [f"class {k}" for k in range(5)]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def read(
    source: object, *, make_model=None, download: bool = True, model: str | None = None, **sizes: int
) -> Found:
    """For a student of 5 classes and colour images of 37 pixels, unless said."""
    told = {"num_classes": 5, "img_size": 37, "in_channels": 3, **sizes}
    return read_teacher(str(source), sizes=told, make_model=make_model, model=model, download=download)


def fitted(found: Found, *, names=NAMES, mean=MEAN, std=STD, precision="fp32") -> Teacher:
    return Teacher(found, class_names=names, mean=mean, std=std, device=CPU, precision=precision)


def pixels(channels: int = 3, side: int = 37) -> Tensor:
    """Of 0 to 1, on the 0 to 1 scale."""
    return torch.rand(3, channels, side, side, generator=torch.Generator().manual_seed(1))


def normalised(images: Tensor, mean, std) -> Tensor:
    return (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def resnet() -> nn.Module:
    from torchvision.models import resnet18

    torch.manual_seed(2)
    return with_trained_head(resnet18(num_classes=5)).eval()


def timms(name: str = "resnet10t") -> nn.Module:
    import timm

    torch.manual_seed(3)
    return timm.create_model(name, num_classes=5).eval()


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("make", "name", "norm"),
    [(resnet, "torchvision:resnet18", IMAGENET), (timms, "timm:resnet10t", IMAGENET)],
)
@pytest.mark.parametrize("end", ["pth", "safetensors"])
def test_weights_of_a_library_answer_as_in_the_library(tmp_path, make, name, norm, end) -> None:
    theirs, file = make(), tmp_path / f"weights.{end}"
    if end == "pth":
        torch.save({"epoch": 3, "state_dict": theirs.state_dict()}, file)
    else:
        from safetensors.torch import save_model

        save_model(theirs, str(file))
    teacher = fitted(read(file, model=name))
    images = pixels()
    with torch.no_grad():
        expected = theirs(normalised(images, *norm))
    assert expected.std() > 0.05
    torch.testing.assert_close(teacher(normalised(images, MEAN, STD)), expected, rtol=1e-5, atol=1e-5)
    assumed = "its 5 have no matching names and are assumed to be those of the data, in the same order"
    assert teacher.classes == assumed


def test_a_model_of_one_size_sees_images_of_that_size(tmp_path) -> None:
    theirs = timms("vit_tiny_patch16_224")
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    teacher = fitted(read(tmp_path / "vit.pth", model="timm:vit_tiny_patch16_224"))
    images = normalised(pixels(), MEAN, STD)
    shown = []
    teacher.model.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0]))
    logits = teacher(images)
    assert shown[0].shape == (3, 3, 224, 224)
    back = 0.5 + 0.5 * shown[0]  # timm's constants of this model
    # torchvision resizes pictures as the teacher should
    from torchvision.transforms.v2.functional import resize

    torch.testing.assert_close(back, resize(pixels(), [224, 224], antialias=True), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(logits, theirs(shown[0]), rtol=1e-5, atol=1e-5)


def test_a_file_of_weights_in_one_of_our_models(tmp_path) -> None:
    from vit_train.config.teacher import _make_model

    theirs = timms("vit_tiny_patch16_224")
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    found = read(tmp_path / "vit.pth", img_size=224, make_model=_make_model, model="vit_tiny")
    images = normalised(pixels(side=224), MEAN, STD)
    with torch.no_grad():
        expected = theirs(images)  # as no file tells it, the student's normalisation counts
    torch.testing.assert_close(fitted(found)(images), expected, rtol=1e-5, atol=1e-4)


def test_a_cached_model_of_a_library_is_read_without_a_download(tmp_path, monkeypatch) -> None:
    from torchvision.models import ResNet18_Weights, resnet18

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    source = "torchvision:resnet18"
    with pytest.raises(CheckpointError, match="not in the cache, and nothing is downloaded here"):
        read(source, download=False)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(5)
    theirs = resnet18().eval()
    torch.save(theirs.state_dict(), folder / ResNet18_Weights.DEFAULT.url.rpartition("/")[2])
    found = read(source, download=False)
    names = ["tench", "goldfish", "ostrich", "toilet tissue", "cock"]
    images = pixels(side=224)
    with torch.no_grad():
        expected = theirs(normalised(images, *IMAGENET))[:, [0, 1, 9, 999, 7]]
    teacher = fitted(found, names=names)
    torch.testing.assert_close(teacher(normalised(images, MEAN, STD)), expected, rtol=1e-5, atol=1e-5)
    assert teacher.classes == "5 of its 1,000, by name"


def test_a_cached_model_of_timm_knows_the_folders_of_imagenet(tmp_path, monkeypatch) -> None:
    import timm
    from huggingface_hub import constants
    from safetensors.torch import save_file

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="not in the cache"):
        read("timm:resnet10t", download=False)
    snapshot = tmp_path / f"models--{timm.get_pretrained_cfg('resnet10t').hf_hub_id.replace('/', '--')}"
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text("0123abc")
    (snapshot / "snapshots" / "0123abc").mkdir(parents=True)
    torch.manual_seed(6)
    theirs = timm.create_model("resnet10t").eval()
    save_file(theirs.state_dict(), snapshot / "snapshots" / "0123abc" / "model.safetensors")
    found = read("timm:resnet10t", download=False)
    names = ["n01443537", "n15075141", "n01440764"]  # goldfish, toilet tissue, tench
    side = found.img_size
    with torch.no_grad():
        expected = theirs(normalised(pixels(side=side), *IMAGENET))[:, [1, 999, 0]]
    logits = fitted(found, names=names)(normalised(pixels(side=side), MEAN, STD))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    assert vit_train_here(*TINY, "run_dir=run", "trainer.precision=fp32", cwd=folder).code == 0
    return folder / "run"


def test_a_run_answers_as_it_does_when_it_predicts(run) -> None:
    own, found = load_trained(run, device=CPU), read(run)
    order = ["9", "3", "5", "0"]
    teacher = fitted(found, names=order, mean=(0.25,), std=(0.5,))
    images = pixels(1, 8)
    with torch.no_grad():
        expected = own.model(normalised(images, own.mean, own.std))
    torch.testing.assert_close(
        teacher(normalised(images, (0.25,), (0.5,))), expected[:, [9, 3, 5, 0]], rtol=1e-5, atol=1e-5
    )
    same = fitted(found, names=own.class_names, mean=own.mean, std=own.std)
    assert same.scale is None and same.picked is None and same.classes == "the same 10"  # noqa: PT018
    given = normalised(images, own.mean, own.std)
    with torch.no_grad():
        assert torch.equal(same(given), own.model(given))


def test_grey_images_are_shown_to_a_teacher_of_coloured_ones(tmp_path) -> None:
    theirs = resnet()
    torch.save(theirs.state_dict(), tmp_path / "r.pth")
    found = read(tmp_path / "r.pth", in_channels=1, model="torchvision:resnet18")
    grey = pixels(1)
    with torch.no_grad():
        expected = theirs(normalised(grey.expand(-1, 3, -1, -1), *IMAGENET))
    logits = fitted(found, mean=(0.3,), std=(0.7,))(normalised(grey, (0.3,), (0.7,)))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_teacher_of_grey_images_has_nothing_to_say_of_colours(run) -> None:
    found = read(run)
    with pytest.raises(ConfigError, match="takes grey images, and the data has colours"):
        fitted(found, names=["0", "1"])


def test_a_teacher_stays_in_evaluation_mode_and_without_gradients(tmp_path) -> None:
    torch.save(resnet().state_dict(), tmp_path / "r.pth")
    teacher = fitted(read(tmp_path / "r.pth", model="torchvision:resnet18"))
    before = copy.deepcopy(teacher.state_dict())
    holder = nn.ModuleList([teacher]).train()
    images = normalised(pixels(), MEAN, STD).requires_grad_()
    answer = holder[0](images)
    assert not answer.requires_grad
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_its_own_precision_whatever_the_students(run) -> None:
    own = load_trained(run, device=CPU)
    found = read(run)
    images = normalised(pixels(1, 8), own.mean, own.std)
    teacher = fitted(found, names=own.class_names, mean=own.mean, std=own.std)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = teacher(images)
    assert torch.equal(inside, teacher(images))
    teacher.precision = "bf16"
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = own.model(images).float()
    assert torch.equal(teacher(images), expected)
    assert not torch.equal(inside, expected)


# ------------------------------------------------------------------------------------------------- classes
def test_classes_are_matched_by_name() -> None:
    assert match_classes(["a", "b"], 2, ["a", "b"]) == (None, "the same 2")
    assert match_classes(["b", "a"], 2, ["a", "b"]) == ([1, 0], "the same 2, reordered")
    assert match_classes(["c", "b", "a"], 3, ["a", "b"]) == ([2, 1], "2 of its 3, by name")
    assert match_classes(["caf\u0065\u0301", "b"], 2, ["b", "caf\u00e9"])[0] == [1, 0]
    wordnet = ["n01440764", "n01443537"]
    picked, said = match_classes(["tench", "goldfish"], 2, wordnet)
    assert picked is None and "assumed" in said  # noqa: PT018
    assert match_classes(wordnet[::-1], 2, wordnet)[0] == [1, 0]


@pytest.mark.parametrize(
    ("theirs", "count", "ours", "message"),
    [
        (["a", "b"], 2, ["a", "x"], r"does not know 1 of the 2 classes of the data \('x'\); it has 2,"),
        (
            list("ab"),
            2,
            list("cdefghi"),
            r"7 of the 7 classes of the data \('c', 'd', 'e', 'f', 'g' and 2 more\); it has 2,",
        ),
        (None, 10, ["a", "b"], "has 10 classes without names, the data 2: they cannot be matched"),
        (["n01440764", "n01443537"], 2, ["n01440764", "n99999999"], "'n99999999'"),
    ],
)
def test_classes_that_are_missing_are_named(theirs, count, ours, message) -> None:
    with pytest.raises(DataError, match=message):
        match_classes(theirs, count, ours)


# ------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("source", "model", "error", "message"),
    [
        (
            "torchvision:resnet19",
            None,
            ConfigError,
            "torchvision has no model 'resnet19' for classification; did you",
        ),
        ("torchvision:fasterrcnn_resnet50_fpn", None, ConfigError, "has no model 'fasterrcnn"),
        ("timm:resnet19", None, ConfigError, "timm has no model 'resnet19'; did you mean"),
        ("timm:hf-hub:someone/something", None, ConfigError, "timm has no model 'hf-hub"),
        ("torchvision:resnet18", "vit_tiny", ConfigError, "leave out objective.teacher_model"),
        ("nothing", None, CheckpointError, "no such run, checkpoint or file; type the place where it is"),
        ("resnet50", None, CheckpointError, "did you mean 'torchvision:resnet50'"),
        ("torchvison:resnet50", None, CheckpointError, "did you mean 'torchvision:resnet50'"),
        (
            "timm:resnet10t.nope",
            None,
            ConfigError,
            "timm has no model 'resnet10t.nope'; did you mean 'resnet10t",
        ),
        ("seven.pth", "torchvision:resnet18", DataError, "has 7 classes without names, the data 5"),
        ("pipe", None, CheckpointError, "no such run, checkpoint or file; type"),
        (
            "file.pth",
            None,
            ConfigError,
            "a file does not say which model its weights are of; type objective.teacher_model=",
        ),
        (
            "file.pth",
            "torchvision:vgg11",
            ConfigError,
            "does not hold torchvision:vgg11 with 5 classes, as the data has",
        ),
        ("nothing.pth", "torchvision:vgg11", CheckpointError, "^objective.teacher="),
        ("empty", None, CheckpointError, "empty"),
    ],
)
def test_one_line_says_what_to_type(tmp_path, monkeypatch, source, model, error, message) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(resnet().state_dict(), "file.pth")
    torch.save(torchvision.models.resnet18(num_classes=7).state_dict(), "seven.pth")
    (tmp_path / "empty").mkdir()
    os.mkfifo("pipe")
    with pytest.raises(error, match=message) as caught:
        read(source, model=model)
    assert "\n" not in str(caught.value)


IN_A_PROCESS = """
import sys
from vit_train.errors import VitTrainError
from vit_train.config.teacher import _make_model
from vit_train.inference.teacher import read_teacher
sizes = {"num_classes": 5, "img_size": 224, "in_channels": 3}
for name in ("vit_huge", "torchvision:vit_h_14", "timm:vit_huge_patch14_224"):
    try:
        read_teacher(sys.argv[1], sizes=sizes, make_model=_make_model, model=name)
    except VitTrainError:
        print("refused")
# The peak of getrusage would count the process of the tests too: it outlives the start of a program.
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak) // 1000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says the peak")
def test_a_small_file_may_not_name_a_huge_model(tmp_path) -> None:
    """Nothing of 2.5 GB of model is allocated before its tensors were looked for in the file."""
    torch.save({"head.weight": torch.zeros(5, 8)}, tmp_path / "small.pth")
    typed = [sys.executable, "-c", IN_A_PROCESS, str(tmp_path / "small.pth")]
    done = subprocess.run(typed, env=environment(), capture_output=True, text=True, check=True)
    *refused, megabytes = done.stdout.split()
    assert refused == ["refused"] * 3
    assert int(megabytes) < 2000, "torch and both libraries take some 700"


@pytest.mark.parametrize("name", ["regnet_y_400mf", "squeezenet1_1", "googlenet"])
def test_files_of_models_that_are_made_in_other_ways(tmp_path, name) -> None:
    """A RegNet cannot be made without memory, a SqueezeNet ends in a convolution, GoogLeNet has heads beside."""
    torch.manual_seed(8)
    options = {"init_weights": True} if name == "googlenet" else {}
    theirs = torchvision.models.get_model(name, num_classes=5, **options).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    images = pixels(side=64)
    with torch.no_grad():
        expected = theirs(normalised(images, *IMAGENET))
    teacher = fitted(read(tmp_path / "w.pth", img_size=64, model=f"torchvision:{name}"))
    torch.testing.assert_close(teacher(normalised(images, MEAN, STD)), expected, rtol=1e-5, atol=1e-5)


def test_its_sha256_changes_with_any_number_and_name(run) -> None:
    found = read(run)
    first = found.sha256()
    assert first == read(run / "checkpoints" / "best").sha256()
    with torch.no_grad():
        next(found.model.parameters()).view(-1)[0] += 1e-6
    assert found.sha256() != first
