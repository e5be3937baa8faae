"""Which tests this machine can run."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    found = "only MPS, which has no float64" if torch.backends.mps.is_available() else "none"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"needs a CUDA device, found {found}"))
