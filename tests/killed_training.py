"""Trains in processes that are killed at random moments, and says how all ended; run by test_checkpoint_file.py."""

import io
import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pyro
import torch
from torch.optim.lr_scheduler import ExponentialLR
from trainings import ByPyro, ByTorch, discriminator

from pyro_wae import WAELoss
from pyro_wae.checkpoint import load_checkpoint, save_checkpoint
from pyro_wae.optim import Adam
from pyro_wae.penalties import MMD, JensenShannon
from pyro_wae.weights import Constraint

# The training by torch leaves pyro.param untrained, which is saved all the same; a scheduler steps in every step, also
# for the parameter that only some steps use.
warnings.filterwarnings("ignore", message="The loss depends on|Detected call of `lr_scheduler.step")

STEPS = 60
BEFORE_FIRST_STEP = 255


def by_pyro():
    """A discriminator that has an optimiser of its own, a constraint and a schedule of the learning rate."""
    optim = Adam({"lr": 1e-2}, scheduler=lambda optimizer: ExponentialLR(optimizer, gamma=0.98))
    return ByPyro(WAELoss(JensenShannon(discriminator()), penalty_weight=Constraint(200, pool=8)), optim)


def by_torch():
    """A torch optimiser, a torch scheduler and a standardised MMD."""
    return ByTorch(WAELoss(MMD(standardize=True, closed_form=False), prior_draws=2))


def train(route, folder, every, progress=None):
    """Trains to the end from the last checkpoint, if there is one; the bits of everything at the end."""
    path = folder / "run.pt"
    pyro.set_rng_seed(1 if not path.exists() else os.getpid())  # what is not restored would differ
    training = {"svi": by_pyro, "torch": by_torch}[route]()
    first = load_checkpoint(path, **training.parts)["step"] if path.exists() else 0
    for step in range(first, STEPS):
        training.step(step)
        if progress is not None:
            os.pwrite(progress, bytes([step]), 0)
        if (step + 1) % every == 0:
            save_checkpoint(path, **training.parts, extra={"step": step + 1})
    buffer = io.BytesIO()
    states = {key: value.tolist() for key, value in training.values().items() if isinstance(value, torch.Tensor)}
    torch.save([states, torch.rand(3).tolist(), random.random(), float(np.random.rand())], buffer)  # noqa: NPY002
    (folder / "end").write_bytes(buffer.getvalue())


def die_in_write(number):
    """Kills this process in its save of that number, after half of the file."""
    calls = iter(range(1, 10**6))
    whole = torch.save

    def half(content, file):
        if not hasattr(file, "fileno") or isinstance(file, io.BytesIO) or next(calls) < number:
            return whole(content, file)
        buffer = io.BytesIO()
        whole(content, buffer)
        file.write(buffer.getvalue()[: buffer.tell() // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


def in_child(function):
    """The process id of a fork that runs the function and ends."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return pid


def main(route, kills, seed, folder):
    draw = random.Random(seed)
    torch.optim.Adam([torch.zeros(1)])  # imports what every child would have to import first
    (folder / "undisturbed").mkdir()
    began = time.monotonic()
    _, status = os.waitpid(in_child(lambda: train(route, folder / "undisturbed", every=10**6)), 0)
    assert status == 0
    length = time.monotonic() - began
    expected = (folder / "undisturbed" / "end").read_bytes()
    killed_at, in_write, ends = [], 0, []
    progress = os.open(folder / "progress", os.O_RDWR | os.O_CREAT)
    trainings = 0
    while len(killed_at) < kills or len(ends) < trainings:
        if len(ends) == trainings:
            trainings += 1
            run = folder / f"run{trainings}"
            run.mkdir()
        every = 1 + draw.randrange(4)
        number = draw.randrange(1, 8)
        writes = draw.random() < 0.3 and len(killed_at) < kills

        def child(run=run, every=every, number=number, writes=writes):
            if writes:
                die_in_write(number)
            train(route, run, every, progress)

        os.pwrite(progress, bytes([BEFORE_FIRST_STEP]), 0)
        pid = in_child(child)
        wait = draw.uniform(0, length / 3)
        if not writes and len(killed_at) < kills:
            time.sleep(wait)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            killed_at.append(os.pread(progress, 1, 0)[0])
            in_write += writes
        else:
            assert status == 0, status
            ends.append((run / "end").read_bytes() == expected)
    print(json.dumps({"kills": killed_at, "in_write": in_write, "ends": ends, "seconds": time.monotonic() - began}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
