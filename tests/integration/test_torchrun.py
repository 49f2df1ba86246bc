"""Training over several processes: the same result, one voice, and back on its feet after a process was killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.config import dcgan_config
from tests.conftest import write_noise_patches
from tests.distributed_losses import both_models
from tests.scripts import run_script
from training import checkpoint
from training.config import TrainConfig
from training.processes import Processes
from training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(processes, *words, restarts=0):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    return [str(word) for word in (*start, "--max-restarts", restarts, "--", *words)]


def losses(processes, steps):
    words = torchrun(processes, ROOT / "tests" / "distributed_losses.py", steps)
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def in_double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_two_processes_take_the_steps_of_one(in_double):
    one, two = both_models(4, Processes()), losses(2, 4)
    for model in ("improved", "dcgan"):
        assert np.allclose(one[model], two[model], rtol=1e-6), model


@pytest.mark.slow
def test_any_number_of_processes_takes_the_steps_of_one(in_double):
    one = both_models(50, Processes())
    for processes in (2, 4):
        several = losses(processes, 50)
        for model in ("improved", "dcgan"):
            assert np.allclose(one[model], several[model], rtol=1e-6), (processes, model)


@pytest.fixture
def patches(tmp_path):
    return write_noise_patches(tmp_path / "patches", 24)


def training(patches, epochs, *more):
    size = ["--model", "dcgan", "--image_size", 64, "--batch_size", 8, "--epochs", epochs, "--device", "cpu", "--workers", 0]
    return [ROOT / "train.py", "--patches", patches, *size, "--save_every", 1, "--eval_every", 0, *more]


def workers_of(parent):
    """Process numbers of the children of a process."""
    path = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(number) for number in path.read_text().split()] if path.exists() else []


@pytest.mark.slow
def test_a_killed_process_comes_back_and_one_alone_goes_on(tmp_path, patches):
    words = torchrun(2, *training(patches, 4), restarts=2)
    with open(tmp_path / "out.txt", "w") as out:
        run = subprocess.Popen(words, cwd=tmp_path, env=ENVIRONMENT, stdout=out, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 120
        while not (tmp_path / "checkpoints" / "epoch_0001.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(workers_of(run.pid)[-1], signal.SIGKILL)
        assert run.wait(timeout=200) == 0, (tmp_path / "out.txt").read_text()
    log = (tmp_path / "logs" / "train.log").read_text()
    assert log.count("batch 8 over 2 processes") == 2 and "resume " in log and log.count("done: 4 epochs") == 1
    rows = [json.loads(line)["images"] for line in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert rows == sorted(set(rows)) and rows[-1] == 4 * 24
    alone = [sys.executable, *map(str, training(patches, 5, "--resume"))]
    done = subprocess.run(alone, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert checkpoint.load(tmp_path / "checkpoints" / checkpoint.FINAL)["progress"]["images"] == 5 * 24


def test_two_processes_generate_the_images_of_one(tmp_path):
    trainer = Trainer(dcgan_config(64, 0), TrainConfig("x", "none"), [], [], 10, torch.device("cpu"))
    (tmp_path / "checkpoints").mkdir()
    checkpoint.save(tmp_path / "checkpoints" / checkpoint.FINAL, trainer.state())
    flags = ["--checkpoint", tmp_path / "checkpoints" / checkpoint.FINAL, "--num", 50, "--device", "cpu", "--out"]
    run_script("generate", *flags, tmp_path / "one")
    words = torchrun(2, ROOT / "generate.py", *flags, tmp_path / "two")
    done = subprocess.run(words, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    made = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        made.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()})
    assert len(made[0]) == 51
    assert made[0] == made[1]


@pytest.mark.slow
def test_two_processes_evaluate_as_one(tmp_path):
    random, found = np.random.default_rng(0), []
    for name in ("patches", "images"):
        for slide in range(20):
            for place in range(8):
                path = tmp_path / name / ("benign", "gleason4")[slide % 2] / f"s{slide}_{place}_0.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    for name, start in (("one", [sys.executable]), ("two", torchrun(2))):
        words = [*start, ROOT / "evaluate.py", "--patches", "patches", "--images", "images", "--out", name, "--device", "cpu"]
        done = subprocess.run(list(map(str, words)), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("report:") == 1
        found.append(json.loads((tmp_path / name / "metrics.json").read_text())["distances"]["inception-v3-2048"]["all"])
    for one, two in zip(found[0].values(), found[1].values(), strict=True):
        assert one == pytest.approx(two, rel=1e-3)


def slurm_script(folder):
    """The script of docs/scaling.md with stand-ins for Slurm: one machine, two CPU processes, a small model."""
    text = (ROOT / "docs" / "scaling.md").read_text().split("```bash\n")[1].split("```")[0]
    small = " ".join(map(str, training("patches", 200)[1:]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    changes = {
        "per_node 8": "per_node 2",
        "train.py --batch_size 128 --epochs 200": f"{ROOT / 'train.py'} {small}",
        "29400": str(port),
    }
    for before, after in changes.items():
        assert text.count(before) == 1
        text = text.replace(before, after)
    commands = {
        "bin/srun": 'exec "$@"',
        "bin/scontrol": "echo localhost",
        "bin/torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
        ".venv/bin/activate": "",
    }
    for name, line in (commands | {"train.sbatch": text}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line if name == "train.sbatch" else f"#!/bin/bash\n{line}\n")
        path.chmod(0o755)
    slurm = {"SLURM_NNODES": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_CPUS_PER_TASK": "1"}
    return ENVIRONMENT | slurm | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


@pytest.mark.slow
def test_the_slurm_script_of_the_documentation_saves_when_signalled_and_goes_on(tmp_path, patches):
    environment, log = slurm_script(tmp_path), tmp_path / "logs" / "train.log"
    for start in ("start: ", "resume "):
        with open(tmp_path / "out.txt", "w") as out:
            run = subprocess.Popen(["bash", "train.sbatch"], cwd=tmp_path, env=environment, stdout=out, stderr=subprocess.STDOUT)
            deadline = time.monotonic() + 200
            while time.monotonic() < deadline and (not log.exists() or start not in log.read_text()):
                time.sleep(0.1)
            before = log.read_text().count("epoch ")
            while time.monotonic() < deadline and log.read_text().count("epoch ") <= before:
                time.sleep(0.1)
            run.terminate()
            run.wait(timeout=100)
        assert start in log.read_text() and "over 2 processes" in log.read_text(), (tmp_path / "out.txt").read_text()
        assert "stopped by SIGTERM after saving" in log.read_text().splitlines()[-1]
    images = [json.loads(line)["images"] for line in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert images == sorted(set(images)), "it went on where it had saved"
