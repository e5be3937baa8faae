"""The examples of tutorials/scale, run as their pages say, and the trainers that they use."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pyro_wae.checkpoint import save_checkpoint

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "tutorials" / "scale"
# --standalone takes a free port: tests may run side by side.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
KINDS = ("weight", "bias")
needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch is built without gloo, which joins processes on CPUs",
)


def run(command, folder, **environment):
    """What a command prints in an empty folder, where it may write nothing but what it is told to."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_XDIST", "CUDA_VIS"))}
    finished = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**inherited, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    assert [path.name for path in folder.iterdir()] in ([], ["out"])
    return finished.stdout


def example(name):
    """An example as a module."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where worker processes look for its classes
    spec.loader.exec_module(module)
    return module


def assert_cost_falls(printed):
    first, last = [float(line.split("cost ")[1].split(",")[0]) for line in printed.splitlines() if "cost " in line]
    assert last < 0.9 * first


@pytest.mark.slow
@needs_gloo
def test_ddp_trains_one_model_in_two_processes(tmp_path):
    out = tmp_path / "out"
    printed = run([*TORCHRUN, EXAMPLES / "ddp.py", "--smoke", "--out", out], tmp_path)
    assert_cost_falls(printed)
    one, other = (torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    one_net, other_net = (saved["states"]["wae"]["values"] for saved in (one, other))
    weights = [name for name in one_net if name.endswith(KINDS)]
    assert len(weights) == 8
    assert all(torch.equal(one_net[name], other_net[name]) for name in weights)
    assert not torch.equal(one["random"]["torch"], other["random"]["torch"])


@pytest.mark.slow
@needs_gloo
def test_fsdp_trains_and_writes_one_checkpoint_of_all_shares(tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    out = tmp_path / "out"
    printed = run([*TORCHRUN, EXAMPLES / "fsdp.py", "--smoke", "--out", out], tmp_path)
    assert_cost_falls(printed)
    shapes = dcp.FileSystemReader(out / "checkpoint").read_metadata().state_dict_metadata
    found = next(item for name, item in shapes.items() if name.endswith("encoder.0.weight") and "wae" in name)
    assert found.size == (256, 784)
    assert len(found.chunks) == 2


@pytest.mark.slow
@needs_gloo
def test_parameters_sharded_over_processes_learn_as_whole_ones_do(tmp_path):
    """Three steps in float64 of each case of sharded_training.py, in two processes."""
    printed = run([*TORCHRUN, Path(__file__).with_name("sharded_training.py")], tmp_path)
    found = {name: float(value) for name, value in (line.split(": ") for line in printed.splitlines())}
    assert {"MMD", "constraint", "hierarchy", "adversary", "adversary of the caller", "micro_batch"} == set(found)
    assert max(found.values()) < 1e-10


@needs_gloo
def test_a_checkpoint_refuses_sharded_parameters_and_says_what_to_write(tmp_path):
    tensors = pytest.importorskip("torch.distributed.tensor")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        layer = torch.nn.Linear(4, 2)
        for name, value in list(layer.named_parameters()):
            shared = tensors.distribute_tensor(value.detach(), mesh, [tensors.Shard(0)])
            layer.register_parameter(name, torch.nn.Parameter(shared))
        with pytest.raises(TypeError, match=r"layer.*weight.*DTensor.* torch\.distributed\.checkpoint\.save"):
            save_checkpoint(tmp_path / "run.pt", layer=layer)
    finally:
        torch.distributed.destroy_process_group()
    assert not list(tmp_path.iterdir())


NO_NETWORK = """
import socket

connect = socket.socket.connect


def guarded(self, address):
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost", socket.gethostname()):
        raise SystemExit(f"a connection to {address}")
    return connect(self, address)


socket.socket.connect = guarded
"""


@pytest.mark.slow
@needs_gloo
def test_lightning_trains_in_two_processes_logs_the_terms_and_leaves_nothing_elsewhere(tmp_path, tmp_path_factory):
    pytest.importorskip("lightning")
    guard = tmp_path_factory.mktemp("guard")
    (guard / "sitecustomize.py").write_text(NO_NETWORK)
    path = os.pathsep.join(filter(None, [str(guard), os.environ.get("PYTHONPATH")]))
    out = tmp_path / "out"
    command = [sys.executable, EXAMPLES / "lightning_trainer.py", "--smoke", "--out", out]
    printed = run(command, tmp_path, PYTHONPATH=path, MASTER_ADDR="127.0.0.1")
    assert "cost" in printed
    with open(next(out.glob("log/*/metrics.csv")), newline="") as file:
        rows = list(csv.DictReader(file))
    trained, held_out = ([row for row in rows if row[name]] for name in ("cost", "val_cost"))
    assert float(trained[1]["cost"]) < 0.9 * float(trained[0]["cost"])
    assert {"penalty", "weight", "epoch"} <= set(rows[0])
    saved = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")
    assert saved["global_step"] == 8  # 2 epochs of 800 digits, 200 of them in a step of both processes
    from pyro_wae.lightning import WAE

    module = WAE(example("digit_wae").DigitWAE())
    module.load_state_dict(saved["state_dict"], strict=False)  # the weight was another
    x = example("digit_wae").digits(200)
    reconstructions = module.wae.reconstruct(x)["x"]
    assert float(held_out[-1]["val_cost"]) == pytest.approx(
        (x - reconstructions).square().sum(1).mean().item(), rel=1e-4
    )
    assert 0 < float(held_out[-1]["val_p"]) <= 1


@pytest.mark.slow
def test_streaming_reads_the_digits_by_worker_processes(tmp_path):
    printed = run([sys.executable, EXAMPLES / "streaming.py", "--smoke", "--out", tmp_path / "out"], tmp_path)
    assert_cost_falls(printed)
    # 1000 digits lie in 2 chunks, one for each worker, of which each makes 2 batches of 200 and leaves out 100 digits.
    assert printed.count(" 4 steps") == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_gives_each_row_once_in_an_epoch_and_in_another_order_in_the_next(tmp_path, workers):
    streaming = example("streaming")
    size, path = 1200, tmp_path / "rows.bin"
    rows = torch.zeros(size, streaming.PIXELS, dtype=torch.uint8)
    rows[:, 0], rows[:, 1] = torch.arange(size) // 100, torch.arange(size) % 100
    rows.numpy().tofile(path)
    stream = streaming.StreamedDigits(path, size)
    orders = []
    for epoch in range(2):
        stream.epoch = epoch
        batches = torch.cat(list(torch.utils.data.DataLoader(stream, batch_size=100, num_workers=workers)))
        digits = (batches * 255).round().long()
        orders.append(digits[:, 0] * 100 + digits[:, 1])
    assert all(torch.equal(order.sort().values, torch.arange(size)) for order in orders)
    assert not torch.equal(*orders)


def test_without_horovod_its_example_says_what_to_install_and_what_to_run_instead():
    if importlib.util.find_spec("horovod") is not None:
        pytest.skip("Horovod is installed")
    with pytest.raises(ImportError, match=r"pip install horovod.* torchrun --nproc_per_node 2 tutorials/scale/ddp\.py"):
        example("horovod_svi")


class Averages:
    """Stands for Horovod in one process of two, by the parts of its interface that are used here.

    The other process has, in every step, a gradient of 0.
    """

    def __init__(self):
        self.named, self.broadcast, self.is_initialised = [], {}, False

    def install(self, monkeypatch):
        package, torch_part = ModuleType("horovod"), ModuleType("horovod.torch")
        torch_part.init = lambda: setattr(self, "is_initialised", True)
        torch_part.size, torch_part.rank, torch_part.local_rank = lambda: 2, lambda: 0, lambda: 0
        torch_part.broadcast_parameters = lambda state, root_rank: self.broadcast.update(state)
        torch_part.DistributedOptimizer = self.wrap
        package.torch = torch_part
        monkeypatch.setitem(sys.modules, "horovod", package)
        monkeypatch.setitem(sys.modules, "horovod.torch", torch_part)

    def wrap(self, optimizer, named_parameters):
        names = [name for name, _ in named_parameters]
        self.named += names
        step = optimizer.step

        def averaged(*args, **kwargs):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad /= 2
            return step(*args, **kwargs)

        optimizer.step = averaged
        return optimizer


def test_horovod_by_contract_wraps_every_parameter_under_its_name(tmp_path, monkeypatch, capsys):
    """Horovod needs MPI and a compiler: what it is called with is checked, and not what it does."""
    stand_in = Averages()
    stand_in.install(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["horovod_svi.py", "--smoke", "--out", str(tmp_path)])
    example("horovod_svi").main()
    assert_cost_falls(capsys.readouterr().out)
    assert stand_in.is_initialised
    parts = [f"{net}.{layer}.{kind}" for net in ("encoder", "decoder") for layer in (0, 2) for kind in KINDS]
    assert set(stand_in.broadcast) == set(parts)
    assert sorted(stand_in.named) == sorted(name.replace(".", "$$$", 1) for name in parts)
