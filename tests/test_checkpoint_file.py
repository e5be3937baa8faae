"""The file of a checkpoint: whole or not there, refused if one bit has changed, loaded as a whole or not at all."""

import ast
import gzip
import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from torch import nn
from trainings import LOSSES, ByPyro, make_former_training, optimised, state_of

import pyro_wae
from pyro_wae.checkpoint import load_checkpoint, save_checkpoint
from pyro_wae.checkpoint.former import agreed_in_format_1

# The trainings by torch leave pyro.param untrained, which is saved all the same.
pytestmark = pytest.mark.filterwarnings("ignore:The loss depends on")

DATA = Path(__file__).with_name("data")


# Damage


def flipped(data, position, bit):
    return data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]


def test_one_changed_bit_anywhere_is_refused(path):
    parts = optimised()
    save_checkpoint(path, **parts)
    data, state = path.read_bytes(), state_of(parts)
    draw = random.Random(0)
    places = [(draw.randrange(len(data)), draw.randrange(8)) for _ in range(200)]
    places += [(len(data) - 1 - back, 0) for back in range(110)]  # the digest, its mark, the end of the directory
    places += [(i + 38, 4) for i in range(len(data)) if data[i : i + 4] == b"PK\x01\x02"]  # passes every checksum
    for position, bit in places:
        path.write_bytes(flipped(data, position, bit))
        with pytest.raises(ValueError, match=r"run\.pt is damaged"):
            load_checkpoint(path, **parts)
        assert state_of(parts) == state


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:0],
        lambda data: data[: len(data) // 10],
        lambda data: data[:-1],
        lambda data: data[:-80],  # what is left is a file of torch.save, but for the length of its comment
        lambda data: data + b"\0",
        lambda data: bytes(len(data)),
        lambda data: b"text",
    ],
    ids=["empty", "cut off", "last byte", "digest", "longer", "zeros", "text"],
)
def test_a_file_of_another_length_or_kind_is_refused(change, path):
    save_checkpoint(path, net=nn.Linear(1, 1))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=r"run\.pt is damaged"):
        load_checkpoint(path, net=nn.Linear(1, 1))


def test_damage_of_a_file_without_a_digest_is_one_error(path):
    """Whatever a decoder meets: 200 bits of a file of format 1 are found damaged, or the rest is compared as ever."""
    data = gzip.decompress((DATA / "format_1_svi.pt.gz").read_bytes())
    draw = random.Random(1)
    for _ in range(200):
        path.write_bytes(flipped(data, draw.randrange(len(data)), draw.randrange(8)))
        with pytest.raises(ValueError, match=r"is damaged|not written by|format|another training, and nothing was loa"):
            load_checkpoint(path, net=nn.Linear(1, 1))


@pytest.mark.parametrize("missing", ["about", "store", "random"])
def test_a_file_without_one_of_its_contents_is_damaged(missing, path):
    contents = ("versions", "about", "store", "states", "random", "extra")
    torch.save({"pyro_wae checkpoint": 1, **{name: {} for name in contents if name != missing}}, path)
    with pytest.raises(ValueError, match=f"run.pt is damaged.*{missing}"):
        load_checkpoint(path, net=nn.Linear(1, 1))


def test_a_checksum_is_compared_where_there_is_no_digest(path):
    data = gzip.decompress((DATA / "format_1_svi.pt.gz").read_bytes())
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size * ("/data/" in entry.filename))
        place = data.index(archive.read(largest))
    path.write_bytes(flipped(data, place + 9, 0))
    with pytest.raises(ValueError, match=r"is damaged.*checksum"):
        load_checkpoint(path, net=nn.Linear(1, 1))


@pytest.mark.parametrize("content", [{"a": 1}, [1], Path()], ids=["dict", "list", "object"])
def test_another_file_of_torch_is_refused(content, path):
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"run.pt.* not written by save_checkpoint"):
        load_checkpoint(path, net=nn.Linear(1, 1))


def test_a_missing_file_is_an_error_of_the_system(path):
    with pytest.raises(FileNotFoundError):
        load_checkpoint(path, net=nn.Linear(1, 1))


# Versions


@pytest.mark.parametrize("route", ["svi", "torch"])
def test_a_checkpoint_of_format_1_resumes_where_it_would_have_gone(route, path):
    """Files of the version before format 2: default loss, with the losses of its eight next steps."""
    path.write_bytes(gzip.decompress((DATA / f"format_1_{route}.pt.gz").read_bytes()))
    expected = json.loads((DATA / f"format_1_{route}.json").read_text())
    pyro.set_rng_seed(99)
    parts, step = make_former_training(route)
    assert load_checkpoint(path, **parts) == {"step": 5}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if torch.empty(8).bernoulli_(0.5).tolist() != [0, 0, 1, 0, 0, 0, 1, 1]:
            pytest.skip("it is loaded, and this torch drops other units with the same random state")
    found = [step(torch.randn(8, 4, dtype=torch.float32)) for _ in range(8)]
    # Bit by bit on the machine that wrote them; sums are rounded in another order elsewhere.
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("there", "here", "other"),
    [
        ("Imq(scale=None)", "Imq(bandwidth=None)", "Imq(bandwidth=1.0)"),
        ("MMD(kernel=Imq(scale=4.0))", "MMD(kernel=Imq(bandwidth=2.0))", "MMD(kernel=Gaussian(bandwidth=2.0))"),
        ("Linear(start=0, end=9)", "LinearSchedule(start=0.0, end=9.0)", "LinearSchedule(start=0, end=8)"),
        ("SequentialLR", "SequentialLR(LinearLR, ConstantLR)", "ChainedScheduler(LinearLR)"),
    ],
)
def test_former_words_are_understood(there, here, other):
    there, here, other = (text.replace("Imq", "InverseMultiquadratic") for text in (there, here, other))
    assert agreed_in_format_1("penalty", there, here)
    assert not agreed_in_format_1("penalty", there, other)


def test_another_format_is_refused_with_the_version_that_wrote_it(path, monkeypatch):
    monkeypatch.setattr("pyro_wae.checkpoint.file.FORMAT", 7)
    monkeypatch.setattr(pyro_wae, "__version__", "9.9.9")
    save_checkpoint(path, net=nn.Linear(1, 1))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"format 7, of pyro_wae 9.9.9; this one, .* reads formats up to 2"):
        load_checkpoint(path, net=nn.Linear(1, 1))


def test_other_versions_of_the_packages_are_read(path, monkeypatch):
    monkeypatch.setattr(pyro_wae, "__version__", "0.1.99")
    save_checkpoint(path, net=nn.Linear(1, 1))
    monkeypatch.undo()
    load_checkpoint(path, net=nn.Linear(1, 1))


# What is in it


def test_a_checkpoint_holds_nothing_that_has_to_be_run(path):
    training = ByPyro(LOSSES["gan"]())
    training.step(0)
    save_checkpoint(path, **training.parts)
    assert torch.load(path, weights_only=True)["versions"]["pyro_wae"] == pyro_wae.__version__
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"pyro_wae sha256 ")


def test_extra_is_returned(path):
    extra = {"step": 3, "costs": [1.5, np.float64(2.5)], "best": {"name": "a", "at": torch.ones(2)}, "done": False}
    extra |= {"set": {1, 2}, "bytes": bytes(300), "long": 2**80, "none": None, "pair": (1, 1j), "odd": "\ud800"}
    save_checkpoint(path, net=nn.Linear(1, 1), extra=extra)
    found = load_checkpoint(path, net=nn.Linear(1, 1))
    assert torch.equal(found["best"].pop("at"), extra["best"].pop("at"))
    assert found == extra


class Marked(torch.Tensor):
    """A tensor of a class that reading would have to import."""


@pytest.mark.parametrize(
    "value",
    [Path(), object(), {1: [Path()]}, frozenset({1}), torch.ones(2).as_subclass(Marked), 10**1000, [10**700]],
    ids=["path", "object", "in a dict", "frozenset", "subclass", "integer", "integer in a list"],
)
def test_extra_that_could_not_be_loaded_is_refused_when_it_is_saved(value, path):
    with pytest.raises(TypeError, match="extra"):
        save_checkpoint(path, net=nn.Linear(1, 1), extra={"value": value})
    assert not list(path.parent.iterdir())


def test_tensors_that_share_memory_go_on_sharing_it(path):
    whole = torch.arange(12.0).reshape(3, 4)
    views = {
        "whole": whole,
        "row": whole[1],
        "columns": whole[:, 1::2],
        "turned": whole.T,
        "wide": whole[:1].expand(5, 4),
    }
    save_checkpoint(path, net=nn.Linear(1, 1), extra=views)
    found = load_checkpoint(path, net=nn.Linear(1, 1))
    for name, view in views.items():
        assert torch.equal(found[name], view)
        assert found[name].stride() == view.stride()
    found["whole"].fill_(7)
    assert all((view == 7).all() for view in found.values())


# Writing


def test_a_folder_is_refused_and_the_line_to_write_is_a_file_in_it(tmp_path):
    folder, svi = tmp_path / "run", nn.Linear(1, 1)
    folder.mkdir()
    with pytest.raises(ValueError, match=r"takes the path of a file, found the folder .*run\. Write ") as raised:
        save_checkpoint(folder, svi=svi)
    assert list(tmp_path.iterdir()) == [folder]
    exec(str(raised.value).partition("Write ")[2].removesuffix("."), {"save_checkpoint": save_checkpoint, "svi": svi})
    assert [file.name for file in folder.iterdir()] == ["run.pt"]


def test_a_symbolic_link_is_written_through(tmp_path):
    (tmp_path / "disk").mkdir()
    target = tmp_path / "disk" / "run.pt"
    (tmp_path / "link.pt").symlink_to(target)  # which does not exist yet
    (tmp_path / "second.pt").symlink_to(tmp_path / "link.pt")
    (tmp_path / "folder").symlink_to(tmp_path / "disk", target_is_directory=True)
    for step, path in enumerate([tmp_path / "link.pt", tmp_path / "second.pt", tmp_path / "folder" / "run.pt"]):
        save_checkpoint(path, net=nn.Linear(1, 1), extra={"step": step})
        assert not target.is_symlink()
        assert (tmp_path / "link.pt").is_symlink()
        assert (tmp_path / "second.pt").is_symlink()
        assert (
            load_checkpoint(target, net=nn.Linear(1, 1)) == load_checkpoint(path, net=nn.Linear(1, 1)) == {"step": step}
        )
    assert [file.name for file in (tmp_path / "disk").iterdir()] == ["run.pt"]


@pytest.mark.parametrize("failing", ["torch.save", "os.fsync", "os.replace", "torch.load"])
def test_a_write_that_fails_leaves_the_last_checkpoint(failing, path, monkeypatch):
    save_checkpoint(path, net=nn.Linear(1, 1))
    before = path.read_bytes()

    def fail(*args, **kwargs):
        if failing == "torch.save":
            args[1].write(b"half")
        raise OSError("no space")

    monkeypatch.setattr(failing, fail)
    with pytest.raises((OSError, TypeError), match="no space"):
        save_checkpoint(path, net=nn.Linear(1, 1))
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["run.pt"]


def test_the_file_is_on_the_disk_before_it_takes_its_name(path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def note(name, function):
        def called(*args):
            size = os.fstat(args[0]).st_size if name == "fsync" else os.path.getsize(args[0])
            calls.append((name, size > 1000))
            return function(*args)

        return called

    monkeypatch.setattr("os.fsync", note("fsync", fsync))
    monkeypatch.setattr("os.replace", note("replace", replace))
    save_checkpoint(path, net=nn.Linear(1, 1))
    assert [name for name, _ in calls] == ["fsync", "replace", "fsync"]  # file, name, folder
    assert calls[0][1]
    assert calls[1][1]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("route", ["svi", "torch"])
def test_a_training_that_is_killed_twenty_times_ends_bit_by_bit_as_an_undisturbed_one(route, tmp_path):
    script = Path(__file__).with_name("killed_training.py")
    command = [sys.executable, "-W", "error", str(script), route, "20", "0", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["kills"]) == 20
    assert found["in_write"] >= 3
    assert len(set(found["kills"])) >= 5  # in different steps
    assert found["ends"]
    assert all(found["ends"])


def test_the_line_that_saves_a_net_of_any_name_is_python(tmp_path):
    net = nn.Linear(2, 2)
    for name in ("my-net", "enc 1", "class"):
        pyro.clear_param_store()
        pyro.module(name, net)
        with pytest.raises(ValueError, match="as in ") as error:
            save_checkpoint(tmp_path / "run.pt", other=nn.Linear(1, 1))
        ast.parse(str(error.value).partition("as in ")[2].partition(". If an")[0])
