"""Order, position, ranks, workers, failures: the promises of a loader."""

import errno
import os
import re
import signal
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from vit_train import rng
from vit_train.data import ArraySource, Found, ImageData
from vit_train.data.loading import loaders, workers
from vit_train.data.transforms.sample_transforms import resized_crop
from vit_train.errors import DataError, WorkerLostError

CPU = torch.device("cpu")
AUGMENT = partial(resized_crop, scale=(0.3, 1.0))


class Arrays(ImageData):
    """Random 8-pixel images in memory; `wrap` may put something around the training source."""

    default_mean = (0.5, 0.5, 0.5)
    default_std = (0.5, 0.5, 0.5)

    def __init__(self, *, size=50, wrap=lambda source: source, **options):
        defaults = {
            "batch_size": 8,
            "num_workers": 0,
            "img_size": None,
            "in_channels": 3,
            "val_fraction": 0.0,
            "limit": None,
            "cache": "none",
            "seed": 0,
            "mean": None,
            "std": None,
            "num_classes": None,
            "sample_transform": None,
        }
        super().__init__(**{**defaults, **options})
        self.size = size
        self.wrap = wrap

    def load(self):
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (self.size, 3, 8, 8), dtype=torch.uint8, generator=generator)
        targets = np.arange(self.size) % 2
        source = ArraySource(pixels, targets, "arrays", np.arange(self.size))
        return Found("arrays", ["a", "b"], {"train": self.wrap(source), "test": source}, 8)


@pytest.fixture
def made():
    """Makes and sets up `Arrays`, and ends their workers afterwards."""
    modules = []

    def make(*, rank=0, world_size=1, **options):
        data = Arrays(**options)
        modules.append(data)
        data.setup(device=CPU, rank=rank, world_size=world_size)
        return data

    yield make
    for data in modules:
        data.close()


def epoch_of(data, epoch=0, step=0):
    loader = data.loader("train")
    loader.set_position(epoch, step)
    return list(loader)


def same(batches, others):
    return len(batches) == len(others) and all(
        torch.equal(a, b) for x, y in zip(batches, others) for a, b in zip(x, y)
    )


def test_a_batch_has_the_promised_types(made):
    data = made()
    batch = epoch_of(data, 3)[0]
    assert batch.images.shape == (8, 3, 8, 8)
    assert [t.dtype for t in batch] == [torch.uint8, torch.int64, torch.int64, torch.int64]
    assert batch.images.is_contiguous()
    assert batch.draw.tolist() == [0] * 8
    original = data.sources["train"].images[batch.index]
    assert torch.equal(batch.images, original)
    assert torch.equal(batch.targets, batch.index % 2)


def test_the_order_is_the_seeded_permutation_and_the_tail_is_dropped(made):
    batches = epoch_of(made(seed=5), epoch=2)
    generator = torch.Generator().manual_seed(rng.mix(5, "order", 2))
    order = torch.randperm(50, generator=generator)
    assert torch.cat([b.index for b in batches]).tolist() == order[:48].tolist()
    assert len(made().loader("train")) == len(batches) == 6


def test_seed_and_epoch_change_order_and_augmentation(made):
    first = epoch_of(made(sample_transform=AUGMENT))
    assert same(first, epoch_of(made(sample_transform=AUGMENT)))
    assert not torch.equal(first[0].index, epoch_of(made(sample_transform=AUGMENT, seed=1))[0].index)
    second = epoch_of(made(sample_transform=AUGMENT), epoch=1)
    assert not torch.equal(first[0].index, second[0].index)
    by_id = {int(i): x for b in first for i, x in zip(b.index, b.images)}
    changed = [
        not torch.equal(by_id[int(i)], x)
        for b in second
        for i, x in zip(b.index, b.images)
        if int(i) in by_id
    ]
    assert sum(changed) > len(changed) // 2


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_give_identical_batches(made, num_workers):
    alone = made(sample_transform=AUGMENT)
    data = made(sample_transform=AUGMENT, num_workers=num_workers)
    for epoch in (0, 1):
        assert same(epoch_of(alone, epoch), epoch_of(data, epoch))
    assert same(list(alone.loader("test")), list(data.loader("test")))


def test_spawned_workers_give_identical_batches(made, monkeypatch):
    monkeypatch.setattr(loaders, "START_METHOD", "spawn")
    data = made(sample_transform=AUGMENT, num_workers=1)
    assert same(epoch_of(made(sample_transform=AUGMENT)), epoch_of(data))


def test_the_global_stream_does_not_reach_the_batches(made):
    torch.manual_seed(1)
    first = epoch_of(made(sample_transform=AUGMENT))
    torch.manual_seed(2)
    assert same(first, epoch_of(made(sample_transform=AUGMENT)))


def test_workers_leave_the_global_stream_alone(made):
    data = made(sample_transform=AUGMENT, num_workers=1)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    epoch_of(data)
    assert torch.equal(torch.rand(1), expected)


@dataclass
class Recorded:
    """Leaves an empty file per image read, whichever process reads it."""

    inner: ArraySource
    folder: str

    @property
    def targets(self):
        return self.inner.targets

    def read(self, index):
        open(f"{self.folder}/{index}", "w").close()  # noqa: PTH123
        return self.inner.read(index)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_position_gives_the_tail_of_the_epoch_and_reads_nothing_before_it(made, tmp_path, num_workers):
    whole = epoch_of(made(sample_transform=AUGMENT), epoch=1)
    data = made(
        sample_transform=AUGMENT, num_workers=num_workers, wrap=partial(Recorded, folder=str(tmp_path))
    )
    tail = epoch_of(data, epoch=1, step=4)
    assert same(whole[4:], tail)
    read = {int(path.name) for path in tmp_path.iterdir()}
    assert read == {int(i) for batch in whole[4:] for i in batch.index}
    assert len(data.loader("train")) == 6


def test_an_abandoned_epoch_does_not_leak_into_the_next(made):
    data = made(num_workers=2)
    for _ in data.loader("train"):
        break
    assert same(epoch_of(data, 1), epoch_of(made(), 1))


def test_a_position_outside_the_epoch_is_refused(made):
    loader = made().loader("train")
    assert [len(loader)] == [6]
    loader.set_position(0, 6)
    assert list(loader) == []
    with pytest.raises(ValueError, match="epoch 0, step 7 is outside an epoch of 6 steps"):
        loader.set_position(0, 7)
    with pytest.raises(ValueError, match="epoch -1"):
        loader.set_position(-1, 0)


def test_fewer_images_than_a_batch_make_one_step_with_all_of_them(made):
    data = made(size=5, batch_size=8)
    batches = epoch_of(data)
    assert len(data.loader("train")) == len(batches) == 1
    assert sorted(batches[0].index.tolist()) == [0, 1, 2, 3, 4]
    assert any("5 training images do not fill data.batch_size=8" in note for note in data.notes)


@pytest.mark.parametrize(
    ("size", "batch_size", "world_size", "note"),
    [
        (127, 64, 1, "63 of 127 training images, different ones each time: data.batch_size=63 leaves out 1"),
        (
            150,
            100,
            1,
            "50 of 150 training images, different ones each time: data.batch_size=75 leaves out none",
        ),
        (190, 100, 2, "90 of 190 training images, different ones each time: data.batch_size=94 leaves out 2"),
        (3, 2, 1, "1 of 3 training images, different ones each time"),
        (72, 64, 1, "8 of 72 training images, different ones each time: data.batch_size=36 leaves out none"),
        (71, 64, 1, None),  # 7 of 71 is less than a tenth
        (128, 64, 1, None),
        (1000, 64, 1, None),
    ],
)
def test_a_tail_that_is_a_tenth_of_the_images_is_said(made, size, batch_size, world_size, note):
    data = made(size=size, batch_size=batch_size, world_size=world_size)
    notes = [note for note in data.notes if "leaves out" in note]
    assert notes == ([] if note is None else [f"each epoch leaves out {note}"])
    seen = sum(len(batch.index) for batch in epoch_of(data)) * world_size
    assert note is None or size - seen == int(note.split()[0])
    if note is not None and "batch_size" in note:
        better, fewer = re.search(r"batch_size=(\d+) leaves out (\d+|none)", note).groups()
        data = made(size=size, batch_size=int(better), world_size=world_size)
        seen = sum(len(batch.index) for batch in epoch_of(data)) * world_size
        assert size - seen == int(fewer.replace("none", "0"))


@pytest.mark.parametrize("options", [{"sampler": "balanced"}, {"repeats": 2}])
def test_a_tail_is_not_said_where_an_epoch_is_not_every_image_once(made, options):
    assert not any("leaves out" in note for note in made(size=127, batch_size=64, **options).notes)


def test_ranks_cut_the_step_of_one_process(made):
    whole = epoch_of(made())
    parts = [epoch_of(made(rank=rank, world_size=2)) for rank in range(2)]
    for step, batch in enumerate(whole):
        assert torch.equal(batch.index, torch.cat([part[step].index for part in parts]))


def test_ranks_share_a_small_set_equally(made):
    parts = [epoch_of(made(size=5, rank=rank, world_size=2)) for rank in range(2)]
    assert [len(part[0].index) for part in parts] == [2, 2]
    with pytest.raises(DataError, match="2 training images cannot be shared by 4 processes"):
        made(size=2, world_size=4).loader("train")


def test_a_batch_size_the_ranks_do_not_divide_is_refused(made):
    with pytest.raises(
        ValueError, match=r"data.batch_size=8 is not divisible by the 3 processes: type data.batch_size=9"
    ):
        made(world_size=3)


def test_evaluation_sees_every_image_once_in_order_over_all_ranks(made):
    whole = torch.cat([b.index for b in made().loader("test")])
    assert whole.tolist() == list(range(50))
    assert len(made().loader("test")) == 7
    parts = [torch.cat([b.index for b in made(rank=r, world_size=4).loader("test")]) for r in range(4)]
    assert sorted(torch.cat(parts).tolist()) == list(range(50))


def test_evaluation_is_never_augmented(made):
    data = made(sample_transform=AUGMENT, val_fraction=0.2)
    for split in ("val", "test"):
        for batch in data.loader(split):
            original = data.sources[split].images[batch.index]
            assert torch.equal(batch.images, original)
    train = epoch_of(data)[0]
    assert not torch.equal(train.images, data.sources["train"].images[train.index])


def test_an_absent_split_is_named(made):
    with pytest.raises(DataError, match="no val split: use one of train, test"):
        made().loader("val")


@dataclass
class Faulty:
    """Does `act` when image 3 is read."""

    inner: ArraySource
    act: object

    @property
    def targets(self):
        return self.inner.targets

    def read(self, index):
        if index == 3:
            self.act()
        return self.inner.read(index)

    def name(self, index):
        return self.inner.name(index)


def unreadable():
    raise DataError("/some/file.jpg cannot be read (cut off)")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def report():
    fields = [
        os.getsid(0) == os.getpid(),
        signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
        torch.get_num_threads(),
    ]
    raise DataError(str(fields))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_is_one_line_without_a_traceback(made, capfd, num_workers):
    data = made(num_workers=num_workers, wrap=partial(Faulty, act=unreadable))
    with pytest.raises(DataError) as raised:
        epoch_of(data)
    assert str(raised.value) == "/some/file.jpg cannot be read (cut off)"
    assert "Traceback" not in capfd.readouterr().err


def test_a_killed_worker_is_named_as_such(made):
    data = made(num_workers=1, wrap=partial(Faulty, act=die))
    with pytest.raises(
        WorkerLostError, match=r"DataLoader worker .*: memory may have run out; type data\.num_workers=0"
    ):
        epoch_of(data)


@pytest.mark.skipif(not hasattr(os, "setsid"), reason="no sessions on this system")
def test_workers_have_their_own_session_ignore_ctrl_c_and_use_one_thread(made):
    data = made(num_workers=1, wrap=partial(Faulty, act=report))
    with pytest.raises(DataError, match=r"\[True, True, 1\]"):
        epoch_of(data)


def children():
    return set(torch.multiprocessing.active_children())


def test_close_ends_the_workers_and_test_keeps_none(made):
    before = children()
    data = made(num_workers=2, val_fraction=0.2)
    list(data.loader("test"))
    assert children() == before
    epoch_of(data)
    list(data.loader("val"))
    workers = children() - before
    assert len(workers) == 4
    epoch_of(data, 1)
    assert children() - before == workers
    data.close()
    deadline = time.monotonic() + 10
    while children() != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children() == before
    data.close()
    assert len(epoch_of(data)) == 5


def test_a_transform_of_the_wrong_shape_is_refused(made):
    data = made(sample_transform=lambda img_size: lambda image: image.resize((4, 4)))
    line = r"cannot be used: ValueError: .* \(3, 8, 8\), got torch.uint8 of shape \(3, 4, 4\)"
    with pytest.raises(DataError, match=line):
        epoch_of(data)


def test_a_transform_may_return_a_tensor(made):
    data = made(sample_transform=lambda size: lambda image: torch.full((3, size, size), 7, dtype=torch.uint8))
    assert epoch_of(data)[0].images.unique().tolist() == [7]


def test_grey_and_resize_follow_the_arguments(made):
    data = made(in_channels=1, img_size=12)
    batch = next(iter(data.loader("test")))
    assert batch.images.shape == (8, 1, 12, 12)
    grey = data.sources["test"].read(0).convert("L").resize((12, 12), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(grey).astype(int) - batch.images[0, 0].numpy()).max() <= 1
    assert data.mean == (0.5,)


def test_limit_cuts_every_split_and_counts_follow(made):
    data = made(limit=8, val_fraction=0.2)
    assert data.sizes == {"train": 8, "val": 8, "test": 8}
    assert data.class_counts == [4, 4]
    assert {*data.sources["val"].ids} <= {*made(val_fraction=0.2).sources["val"].ids}
    assert made(limit=10, seed=9).fingerprint() == made(limit=10, seed=0).fingerprint()


def test_train_fraction_cuts_train_only_and_smaller_ones_are_parts_of_larger_ones(made):
    data = made(train_fraction=0.25, val_fraction=0.2)
    assert data.sizes == {"train": 10, "val": 10, "test": 50}
    assert data.class_counts == [5, 5]
    assert "data.train_fraction=0.25: 10 training images" in data.notes
    ids = [{*made(train_fraction=f, val_fraction=0.2).sources["train"].ids} for f in (0.1, 0.25, 1.0)]
    assert ids[0] < ids[1] < ids[2]
    assert made(train_fraction=0.001).class_counts == [1, 1]  # one of each class stays


def test_a_limit_larger_than_the_set_says_so(made):
    data = made(limit=99)
    assert data.sizes["train"] == 50
    assert "data.limit=99 keeps all training images: there are 50" in data.notes


def test_a_limit_below_the_class_count_is_refused(made):
    with pytest.raises(
        DataError, match=r"data\.limit=1 cannot hold one image of each of 2 classes: type data.limit=2"
    ):
        made(limit=1)


def test_an_unexpected_class_count_is_refused(made):
    assert made(num_classes=2).num_classes == 2
    with pytest.raises(DataError, match=r"data\.num_classes=7, but arrays has 2"):
        made(num_classes=7)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"cache": "device", "sample_transform": AUGMENT},
            "cache=device holds finished images.*augment=light",
        ),
        ({"mean": (0.5,)}, r"mean needs one value per channel: in_channels is 3, got \(0.5,\)"),
    ],
)
def test_values_that_contradict_each_other_are_refused(options, line):
    with pytest.raises(ValueError, match=line):
        Arrays(**options)


def test_the_fingerprint_follows_the_pixels_and_the_split(made):
    print_ = made().fingerprint()
    assert len(print_) == 64
    assert made(batch_size=4, num_workers=1).fingerprint() == print_
    assert made(val_fraction=0.2).fingerprint() != print_
    changed = made()
    changed.sources["train"].images[0, 0, 0, 0] ^= 1
    assert changed.fingerprint() != print_


def test_examples_are_spread_over_a_split_as_evaluation_sees_them(made):
    data = made(sample_transform=AUGMENT)
    batch = data.examples("train", 5)
    assert batch.index.tolist() == [0, 10, 20, 30, 40]
    assert torch.equal(batch.images, data.sources["train"].images[batch.index])
    assert len(data.examples("test", 99).index) == 50


def test_an_error_of_the_users_own_code_is_not_taken_for_a_lost_worker():
    assert workers.worker_lost(RuntimeError("Caught RuntimeError in DataLoader worker process 0.")) is None
    assert workers.worker_lost(EOFError("Caught EOFError in DataLoader worker process 0.")) is None
    assert isinstance(workers.worker_lost(EOFError()), WorkerLostError)


def refuse(number):
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.EMFILE, WorkerLostError, r"too many open files \(ulimit -n\); type data\.num_workers=0"),
        (errno.ENFILE, WorkerLostError, r"too many open files on this machine; type data\.num_workers=0"),
        (errno.ENOMEM, MemoryError, "Cannot allocate memory"),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_ran_out_where_an_image_is_read_is_no_fault_of_workers_that_are_not_there(
    made, number, kind, words, num_workers
):
    data = made(num_workers=num_workers, wrap=partial(Faulty, act=partial(refuse, number)))
    with pytest.raises(kind if num_workers else OSError, match=words if num_workers else os.strerror(number)):
        epoch_of(data)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits are POSIX")
def test_processes_that_may_not_be_started_are_said(made):
    import resource

    data, (ours, theirs) = made(num_workers=1), os.pipe()
    if (pid := os.fork()) == 0:
        if os.getuid() == 0:  # whom no limit holds
            os.setuid(65534)
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        try:
            epoch_of(data)
        except BaseException as error:
            os.write(theirs, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(theirs)
    said = os.read(ours, 1000).decode()
    os.waitpid(pid, 0)
    os.close(ours)
    assert said == (
        "WorkerLostError: data workers: no more processes may be started (ulimit -u); type data.num_workers=0 "
        "or a smaller number"
    )


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
@pytest.mark.parametrize("moment", ["read_by", "close"])
def test_a_death_that_is_told_while_the_first_error_is_handled_is_no_error_of_its_own(made, moment):
    """torch raises it from a signal handler, wherever the main thread is."""
    loader = made(num_workers=2).loader("train")
    batches = iter(loader)
    next(batches)
    handle = getattr(loader, moment)

    def interrupted(*arguments):
        for worker in getattr(loader._iterator, "_workers", []):
            worker.kill()
        time.sleep(1)  # until the handler raises
        return handle(*arguments)

    setattr(loader, moment, interrupted)
    lost = loader._lost(RuntimeError("DataLoader worker (pid 1) exited unexpectedly"))
    assert isinstance(lost, WorkerLostError)
    assert re.match(r"DataLoader worker \(pid \d+\) is killed by signal: Killed", str(lost))
