"""Which tests this machine can run, and what they find as torch's defaults.

PYRO_WAE_TEST_DTYPE=float64 makes float64 the default dtype. PYRO_WAE_TEST_DEVICE=meta puts each tensor that the package
makes without naming a device on the meta device, where it has no values, as a default device does that is not the
data's. Constructors are left out: the state of a module is on the default device until the module is moved.
"""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import pyro
import pytest
import torch
from pyro.poutine import runtime
from torch.overrides import TorchFunctionMode

from pyro_wae import hints

PACKAGE = str(Path(__file__).parents[1] / "pyro_wae")
DTYPE, DEVICE = (os.environ.get(f"PYRO_WAE_TEST_{name}") for name in ("DTYPE", "DEVICE"))
MAKERS = {
    getattr(torch, name)
    for name in (
        *("arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn", "randperm"),
        *("scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
    )
}

LEFT_ALONE = ("__init__", "register_fitted", "_default_device")
"""Functions that make the state of a module, and the one that asks what the default device is."""

if DTYPE:
    torch.set_default_dtype(getattr(torch, DTYPE))


class OtherDevice(TorchFunctionMode):
    """Makes tensors on DEVICE where a line of the package makes them without naming a device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_silent = function in MAKERS and kwargs.get("device") is None
        line = sys._getframe(1).f_code
        if is_silent and line.co_filename.startswith(PACKAGE) and line.co_name not in LEFT_ALONE:
            kwargs = {**kwargs, "device": DEVICE}
        return function(*args, **kwargs)


@pytest.fixture(autouse=True)
def _fresh_start(request):
    """Each test starts from an empty parameter store and its file's SEED, and leaves no handler of Pyro's behind."""
    pyro.clear_param_store()
    pyro.set_rng_seed(getattr(request.module, "SEED", 0))
    hints._trained.clear()
    with OtherDevice() if DEVICE else nullcontext():
        yield
    assert runtime._PYRO_STACK == []
    assert runtime._DIM_ALLOCATOR._stack == []


@pytest.fixture
def one_thread():
    """Bit by bit the same sums, and as many processes as the tests are run with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def path(tmp_path):
    """Where a checkpoint goes."""
    return tmp_path / "run.pt"


@pytest.fixture(scope="session")
def ot():
    """POT, whose values are exact; the core tests do without it."""
    return pytest.importorskip("ot")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    found = "only MPS, which has no float64" if torch.backends.mps.is_available() else "none"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"needs a CUDA device, found {found}"))


@pytest.fixture
def single_precision():
    """float32 where a test names no dtype: for what is said of float32, under any default of torch."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(default)
