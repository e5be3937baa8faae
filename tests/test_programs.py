"""The programs of programs.py, each by every way in which a step can be run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch
from program_table import PROGRAMS, check, run

ROUTES = {
    "svi": {},
    "module": {"route": "module"},
    "particles": {"num_particles": 2},
    "vectorised particles": {"num_particles": 2, "vectorize_particles": True},
    "micro-batches": {"micro_batch": 3},
    "bfloat16": {"autocast": True, "route": "module"},
    "float64": {"dtype": torch.float64},
    "unvalidated": {},
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_step_is_what_the_table_says(name, route):
    with pyro.validation_enabled(route != "unvalidated"):
        found = run(PROGRAMS[name], **ROUTES[route])
    rounding = 4 * 2.0**-8 if route == "bfloat16" else 0.0
    check(name, found, route=route, tolerance=rounding, validated=route != "unvalidated")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What each of two processes finds with half of the data."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(Path(__file__).with_name("program_table.py"))]
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(folder / "store"), str(folder / f"{rank}.json")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch is built without gloo, which joins processes on CPUs",
)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_step_of_two_ranks_is_what_the_table_says(name, two_ranks):
    for found in two_ranks:
        check(name, found[name], route="ranks")
