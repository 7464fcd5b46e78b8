"""`vit-train` as its users meet it: help, a run directory, stopping and going on, sweeps, signals."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from conftest import TINY, command, environment, everything_in, vit_train_here
from PIL import Image

GROUPS = ("model", "data", "augment", "objective", "optimizer", "schedule", "strategy", "trainer", "tracker")


def process(*arguments, cwd, flags=(), program=("-m", "vit_train")):
    return subprocess.run(
        [sys.executable, *flags, *program, *arguments],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


# ------------------------------------------------------------------------------------------------ asking it
@pytest.mark.parametrize(
    "arguments", [["--help"], ["--cfg", "job"], ["--cfg", "job", "model=swin_cifar", "data=cifar10"]]
)
def test_asking_imports_no_torch_and_writes_nothing(tmp_path, arguments):
    done = process(*arguments, cwd=tmp_path, flags=["-X", "importtime"])
    assert done.returncode == 0
    imported = re.findall(r"^import time:.*\|\s*(\S+)$", done.stderr, flags=re.MULTILINE)
    assert "vit_train.cli.train" in imported or "vit_train.config.build" in imported, (
        "importtime says nothing"
    )
    heavy = {"torch", "torchvision", "sklearn", "matplotlib", "tensorboard", "vit_train.training.trainer"}
    assert not heavy & set(imported)
    assert list(tmp_path.iterdir()) == []
    if arguments == ["--help"]:
        for group in (*GROUPS, "experiment"):
            assert re.search(rf"^{group}: \w+", done.stdout, flags=re.MULTILINE), group
        assert "vit-train --cfg job" in done.stdout
    else:
        assert set(yaml.safe_load(done.stdout)) >= set(GROUPS)


def test_the_module_is_the_command(tmp_path):
    script = Path(sys.executable).with_name("vit-train")
    if not script.exists():
        pytest.skip("vit-train is not installed beside this interpreter")
    arguments = ["--cfg", "job", "optimizer.lr=0.5"]
    installed = subprocess.run(
        [str(script), *arguments], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True
    )
    assert installed.stdout == process(*arguments, cwd=tmp_path).stdout
    assert "lr: 0.5" in installed.stdout


# ------------------------------------------------------------------------------------------- the run directory
@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A whole run as a process with its output piped, made once: (its directory, the finished process)."""
    home = tmp_path_factory.mktemp("full")
    done = process(*TINY, "tracker.tensorboard=true", "run_dir=run", cwd=home)
    assert done.returncode == 0, done.stderr
    return home / "run", done


@pytest.fixture
def run(full, in_tmp):
    """A copy of it in the working directory."""
    shutil.copytree(full[0], in_tmp / "run", symlinks=True)
    return Path("run")


@pytest.fixture
def typed(in_tmp):
    """`vit-train` in this process, in an empty directory."""
    return functools.partial(vit_train_here, cwd=in_tmp)


def result_of(run):
    return json.loads((run / "result.json").read_text())


def test_a_run_leaves_the_files_it_promises(full):
    run, _ = full
    promised = {
        "config.yaml",
        "run.json",
        "result.json",
        "metrics.jsonl",
        "train.log",
        "tensorboard",
        "history.png",
    }
    assert {path.name for path in run.iterdir()} == promised | {"checkpoints"}
    assert {path.name for path in run.parent.iterdir()} == {"run"}
    assert [path.name.startswith("events.out.tfevents.") for path in (run / "tensorboard").iterdir()] == [
        True
    ]
    checkpoints = run / "checkpoints"
    steps = {path.name for path in checkpoints.iterdir()} - {"last", "best"}
    assert "step_00000015" in steps
    assert all(re.fullmatch(r"step_\d{8}", name) for name in steps)
    tensors = {"model.safetensors", "ema.safetensors", "optimizer.safetensors"}
    for step in steps:
        assert {p.name for p in (checkpoints / step).iterdir()} == tensors | {"state.json", "manifest.json"}
    for link in ("last", "best"):
        target = str((checkpoints / link).readlink())
        assert target in steps, f"{link} is not a relative link to a checkpoint: {target}"
    assert str((checkpoints / "last").readlink()) == "step_00000015"


def test_the_stored_configuration_is_plain(full):
    text = (full[0] / "config.yaml").read_text()
    assert "${" not in text
    assert "!!" not in text
    config = yaml.safe_load(text)
    assert set(config) >= {*GROUPS, "name", "seed", "run_dir", "resume"}
    assert config["name"] == "vit_digits-digits"
    assert config["data"]["num_classes"] == config["model"]["num_classes"] == 10
    assert config["trainer"]["precision"] == "fp32"


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_bf16_is_doubted_where_this_processor_does_not_gain_by_it(in_tmp, precision):
    done = vit_train_here(
        *TINY, f"trainer.precision={precision}", "strategy=single", "strategy.device=cpu", cwd=in_tmp
    )
    assert done.code == 0, done.err
    said = "trainer.precision=bf16: fp32 is probably faster on this processor, perhaps much faster"
    known = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
    gains = known & {"amx_tile", "bf16"} or {"avx512_bf16", "AuthenticAMD"} <= known
    assert (said in " ".join(done.out.split())) is (precision == "bf16" and not gains)
    done = vit_train_here("summary=true", f"trainer.precision={precision}", cwd=in_tmp)
    assert (said in " ".join(done.out.split())) is (precision == "bf16" and not gains)


def test_run_json_holds_what_repeats_the_run(full):
    facts = json.loads((full[0] / "run.json").read_text())
    assert set(facts["versions"]) >= {"vit-train", "torch", "torchvision", "numpy", "python"}
    assert facts["versions"]["torch"] == version("torch")
    assert len(facts["dataset_fingerprint"]) == 64
    assert facts["host"]
    assert facts["device"].startswith("cpu")
    assert facts["started"][0]["argv"][1:] == [*TINY, "tracker.tensorboard=true", "run_dir=run"]
    assert {"sha", "dirty"} == set(facts["git"] or {"sha": 0, "dirty": 0})


def test_result_json_holds_fractions(full):
    result = result_of(full[0])
    figures = ["best/val", "last/val", "test"]
    for key in figures:
        assert 0 <= result[f"{key}/top1"] <= result[f"{key}/top5"] <= 1
        assert result[f"{key}/loss"] > 0
    hits = result["test/top1"] * 80  # data.limit cuts every split
    assert hits == pytest.approx(round(hits), abs=1e-9)
    assert (result["epochs"], result["steps"], result["steps_per_epoch"]) == (3, 15, 5)
    assert result["seconds"] > 0
    assert result["images_per_second"] == pytest.approx(15 * 16 / result["seconds"])
    assert result["best/epoch"] in (1, 2, 3)
    assert result["last/epoch"] == 3
    assert not result["stopped_early"]


def test_metrics_are_one_object_per_event(full):
    events = [json.loads(line) for line in (full[0] / "metrics.jsonl").read_text().splitlines()]
    assert [(e["event"], e["step"]) for e in events if e["event"] != "step"] == [
        ("epoch", 5),
        ("epoch", 10),
        ("epoch", 15),
        ("test", 15),
    ]
    assert {e["step"] for e in events if e["event"] == "step"} == {1, 10}


def test_piped_output_has_no_colours_and_no_bars(full):
    run, done = full
    log = (run / "train.log").read_text()
    for text in (done.stdout, done.stderr, log):
        assert "\x1b" not in text
        assert "\r" not in text
        assert "it/s" not in text
        assert "%|" not in text
    assert done.stderr == ""
    assert log == done.stdout
    assert sum(line.startswith("epoch ") for line in log.splitlines()) == 3


def test_the_closing_lines_name_the_next_commands(full):
    run, done = full
    closing = done.stdout.splitlines()[-4:]
    assert [line[:15].strip() for line in closing] == ["run directory", "curves", "evaluate", "train longer"]
    assert [line[15:] for line in closing] == [
        "run",
        "tensorboard --logdir .",
        "vit-eval run",
        "vit-train resume=run trainer.epochs=6",
    ]
    top1 = result_of(run)["test/top1"]
    assert re.search(rf"^ *test .* {100 * top1:.2f} ", done.stdout, flags=re.MULTILINE)


def test_the_history_is_a_picture(full):
    with Image.open(full[0] / "history.png") as picture:
        assert picture.format == "PNG"
        picture.load()
        assert min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20, "an empty picture"


# ------------------------------------------------------------------------------------------------- going on
def test_a_finished_run_says_so(typed, run, in_tmp):
    before = everything_in(in_tmp)
    for arguments in (["resume=run"], [*TINY, "tracker.tensorboard=true", "run_dir=run"]):
        done = typed(*arguments)
        assert (done.code, done.err) == (0, "")
        assert done.out == "run is finished: nothing to do. To see its figures, type:  vit-eval run\n"
        assert everything_in(in_tmp) == before


def test_a_finished_run_can_grow(typed, run):
    done = typed("resume=run", "trainer.epochs=4", "tracker.tensorboard=false")
    assert done.code == 0, done.err
    assert re.search(r"trainer\.epochs: 3 -> 4: the schedule now spans the new budget", done.out)
    assert re.search(r"^continues +after step 15", done.out, flags=re.MULTILINE)
    assert [line[:9] for line in done.out.splitlines() if line.startswith("epoch ")] == ["epoch 4/4"]
    assert (result_of(run)["steps"], result_of(run)["epochs"]) == (20, 4)
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["epochs"] == 4


def test_a_limit_stops_with_the_command_that_goes_on(typed, in_tmp, full):
    long_name = "a_run_directory_whose_name_is_longer_than_a_line_" + "x" * 100
    done = typed(*TINY, "trainer.stop_at_step=7", f"run_dir={long_name}")
    assert (done.code, done.err) == (0, "")
    assert not (in_tmp / long_name / "result.json").exists()
    assert re.search(r"^weights +from scratch *$", done.out, flags=re.MULTILINE)
    said, printed = done.out.splitlines()[-2:]
    assert "stopped at step 7 (trainer.stop_at_step)" in said
    assert printed.strip() == f"vit-train resume={long_name}"
    assert printed in (in_tmp / long_name / "train.log").read_text().splitlines()
    again = typed(*printed.split()[1:])
    assert again.code == 0, again.err
    assert re.search(r"^continues +after step 7", again.out, flags=re.MULTILINE)
    assert re.search(r"^weights +from step_00000007 of this run *$", again.out, flags=re.MULTILINE)
    went_on, straight = result_of(in_tmp / long_name), result_of(full[0])
    for key in ("test/loss", "test/top1", "best/val/loss", "steps"):
        assert went_on[key] == straight[key], "another result than the uninterrupted run"


def test_a_sweep_has_a_directory_per_job(typed, in_tmp):
    done = typed("-m", "seed=0,1", *TINY, "trainer.epochs=1")
    assert (done.code, done.err) == (0, "")
    assert [path.name for path in in_tmp.iterdir()] == ["sweeps"]
    (sweep,) = (in_tmp / "sweeps").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", sweep.name)
    assert sorted(path.name for path in sweep.iterdir() if path.is_dir()) == ["0", "1"]
    results = [result_of(sweep / job) for job in ("0", "1")]
    assert [result["seed"] for result in results] == [0, 1]
    assert results[0]["test/loss"] != results[1]["test/loss"]


def test_a_sweep_ends_with_a_table_of_its_jobs(typed, in_tmp):
    """Once more when all of it is finished or failed, and one result is damaged."""
    sweep = ("-m", "optimizer.lr=1e-3,1e30", "seed=0,5", *TINY, "trainer.epochs=1", "hydra.sweep.dir=all")
    keys = ("best/val/top1", "last/val/top1", "test/top1")
    for damaged in (False, True):
        done = typed(*sweep)
        assert done.code == 6, done.err
        table = [line.split() for line in done.out[done.out.rindex(" job ") :].splitlines()]
        rows = {int(line[0]): line[1:] for line in table[:-1] if line and line[0].isdecimal()}
        assert [rows[2], rows[3]] == [
            ["optimizer.lr=1e+30", f"seed={seed}", "-", "-", "-"] for seed in (0, 5)
        ]
        for job, seed in ((0, 0), (1, 5)):
            top1 = ["-"] * 3
            if not (damaged and job == 1):
                top1 = [f"{100 * result_of(in_tmp / 'all' / str(job))[key]:.2f}" for key in keys]
            assert rows[job] == ["optimizer.lr=0.001", f"seed={seed}", *top1]
        assert sum(line[:1] == ["mean"] for line in table) == (0 if damaged else 1)
        assert " ".join(table[-1]) == f"4 jobs, {2 + damaged} without a result"
        (in_tmp / "all/1/result.json").write_text("[1]")
    done = typed("-m", "seed=0,1", "summary=true")
    assert (done.code, "without a result" in done.out) == (0, False)


def test_a_requeued_job_finds_its_run(typed, in_tmp):
    """The same command again; another job gets a directory of its own."""
    job = (*TINY, "trainer.epochs=1")
    first = typed(*job, "trainer.stop_at_step=2", SLURM_JOB_ID="77")
    assert first.code == 0, first.err
    home = in_tmp / "runs" / "vit_digits-digits"
    assert [path.name for path in home.iterdir()] == ["job_77"]
    second = typed(*job, SLURM_JOB_ID="77")
    assert second.code == 0, second.err
    assert re.search(r"^continues +after step 2", second.out, flags=re.MULTILINE)
    assert result_of(home / "job_77")["steps"] == 5
    assert len(json.loads((home / "job_77/run.json").read_text())["started"]) == 2
    other = typed(
        *job, "trainer.stop_at_step=0", SLURM_ARRAY_JOB_ID="78", SLURM_ARRAY_TASK_ID="3", SLURM_JOB_ID="80"
    )
    assert other.code == 0, other.err
    assert {path.name for path in home.iterdir()} == {"job_77", "job_78_3"}


def test_the_name_of_a_job_leads_nowhere_else(typed, in_tmp):
    done = typed(*TINY, "trainer.stop_at_step=0", SLURM_JOB_ID="../../elsewhere")
    assert done.code == 0, done.err
    assert [path.name for path in in_tmp.iterdir()] == ["runs"]
    assert [path.name for path in (in_tmp / "runs/vit_digits-digits").iterdir()] == ["job_.._.._elsewhere"]


# -------------------------------------------------------------------------------------------------- signals
@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
def test_signals_save_and_the_run_goes_on(typed, in_tmp):
    """Two real runs at once; each is told to stop once it has trained for a while."""
    signals = {"SIGTERM": 143, "SIGINT": 130}
    running = {}
    try:
        for name in signals:
            arguments = (
                *TINY,
                "trainer.epochs=100000",
                "trainer.eval_every_epochs=100000",
                f"run_dir={name}",
            )
            arguments = (*arguments, "trainer.save_every_epochs=100000")
            running[name] = subprocess.Popen(
                command("vit_train", *arguments),
                cwd=in_tmp,
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        for name, child in running.items():
            wait_for_epochs(child)
            child.send_signal(getattr(signal, name))
        for name, child in running.items():
            out, err = child.communicate(timeout=60)
            assert child.returncode == signals[name], err
            step = int(re.search(rf"stopped by {name}; step (\d+) is saved", out).group(1))
            assert out.splitlines()[-1].strip() == f"vit-train resume={name}"
            assert "Traceback" not in err
            last = in_tmp / name / "checkpoints" / "last"
            assert str(last.readlink()) == f"step_{step:08d}"
            again = typed(f"resume={name}", f"trainer.stop_at_step={step + 3}")
            assert again.code == 0, again.err
            assert str(last.readlink()) == f"step_{step + 3:08d}"
    finally:
        for child in running.values():
            child.kill()
            child.wait()


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
@pytest.mark.parametrize("half_built", ["defaults", "config_sources"])
def test_ctrl_c_while_the_configuration_is_composed(tmp_path, half_built):
    """OmegaConf tidies up half a list then, fails at it, and raises an error of its own."""
    program = f"""
import os, signal, sys
from vit_train.cli.train import main

def press(frame, event, argument):
    if event == "call" and frame.f_code.co_name == "_node_wrap":
        parent = frame.f_locals["parent"]
        if parent is not None and parent._key() == "{half_built}":
            sys.setprofile(None)
            os.kill(os.getpid(), signal.SIGINT)

sys.setprofile(press)
main()
"""
    done = process("--cfg", "job", cwd=tmp_path, program=("-c", program))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
@pytest.mark.parametrize("name", ["train", "evaluate", "predict", "explain", "export", "data_command"])
def test_ctrl_c_while_a_command_is_imported(tmp_path, name):
    program = f"""
import os, signal, sys

def press(frame, event, argument):
    if event == "call" and frame.f_code.co_name == "<module>" and frame.f_globals["__name__"] == "vit_train.cli.{name}":
        sys.setprofile(None)
        os.kill(os.getpid(), signal.SIGINT)

sys.setprofile(press)
from vit_train.cli.{name} import main
"""
    done = process(cwd=tmp_path, program=("-c", program))
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def wait_for_epochs(child):
    """Until the run says that its second epoch is over, so that it is in the middle of training."""
    deadline = time.monotonic() + 120
    for line in child.stdout:
        if re.match(r"epoch +2/", line):
            return
        assert time.monotonic() < deadline
    raise AssertionError(f"it ended: {child.stderr.read()}")
