"""Buffers that a run of a net changes: running statistics, and the vectors of a power iteration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pyro_wae._core.private import RunningNorm


class Buffers:
    """The values that the buffers of modules have now, with which a run can be repeated later.

    Args:
        modules: The modules, those within others too.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._kept = [
            (module, own, own.detach().clone(), own._version)
            for module in modules
            for own in module.buffers(recurse=False)
            if not nn.parameter.is_lazy(own) and not own.is_inference()
        ]

    def keep_changed(self) -> None:
        """Forgets the buffers of modules in which none has changed: data or a table may be kept as one."""
        # The kernels that update running statistics do not count as changes of them.
        changed = {module for module, own, _, version in self._kept if own._version != version}
        self._kept = [kept for kept in self._kept if kept[0] in changed or isinstance(kept[0], RunningNorm)]

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Gives the buffers the values that were kept, and at the end those that they have now."""
        now = [own.detach().clone() for _, own, *_ in self._kept]
        try:
            self._set(value for _, _, value, _ in self._kept)
            yield
        finally:
            self._set(now)

    @torch.no_grad()
    def _set(self, values: Iterable[Tensor]) -> None:
        for (_, own, *_), value in zip(self._kept, values, strict=True):
            own.copy_(value)
