"""`vit-data digits`: the folder it writes, what it refuses, and that nothing half-written stays."""

import subprocess
import sys
import time

import numpy as np
import torch
from PIL import Image

from vit_train.cli.data_command import main
from vit_train.data import Digits, ImageFolder

CPU = torch.device("cpu")


def test_the_folder_reads_back_as_the_same_dataset(tmp_path, capsys):
    root = tmp_path / "new" / "digits"
    assert main(["digits", str(root)]) == 0
    out = capsys.readouterr().out
    assert f"wrote 1292 train, 145 val, 360 test images to {root}" in out
    assert f"vit-train data=imagefolder data.root={root}" in out

    digits, folder = Digits(), ImageFolder(root=str(root), in_channels=1)
    for data in (digits, folder):
        data.setup(device=CPU, rank=0, world_size=1)
    assert folder.sizes == digits.sizes
    assert folder.class_names == digits.class_names
    assert folder.img_size == 8
    for split, source in folder.sources.items():
        written = digits.sources[split]
        for i in range(len(source.targets)):
            original = int(source.names[i].rsplit("/", 1)[1].removesuffix(".png"))
            assert source.targets[i] == written.targets[original]
            assert np.array_equal(np.asarray(source.read(i)), np.asarray(written.read(original)))


def test_an_empty_folder_is_taken_and_a_full_one_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["digits", str(tmp_path / "empty")]) == 0
    capsys.readouterr()
    assert main(["digits", str(tmp_path / "empty")]) == 3
    captured = capsys.readouterr()
    assert captured.err == f"vit-data: error: {tmp_path / 'empty'} is not an empty folder: name a new one\n"
    assert captured.out == ""
    (tmp_path / "file").write_text("")
    assert main(["digits", str(tmp_path / "file")]) == 3


def test_a_write_that_fails_leaves_nothing(tmp_path, capsys, monkeypatch):
    saves = []
    save = Image.Image.save

    def fail_late(self, *args, **kwargs):
        saves.append(args)
        if len(saves) > 100:
            raise OSError(28, "No space left on device")
        save(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", fail_late)
    assert main(["digits", str(tmp_path / "digits")]) == 3
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_exit_with_2():
    for argv in ([], ["digit", "x"], ["digits"]):
        assert main(argv) == 2


def test_help_answers_without_importing_torch():
    code = (
        "import sys; from vit_train.cli.data_command import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print('torch' in sys.modules, 'sklearn' in sys.modules)"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"
    assert time.monotonic() - start < 5
