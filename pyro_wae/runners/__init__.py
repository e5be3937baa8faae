"""How a step is run: as it is, in micro-batches, over ranks."""

from __future__ import annotations

from pyro_wae.distributed import GroupLike, check_group
from pyro_wae.runners.micro_batches import MicroBatches
from pyro_wae.runners.ranks import Ranks
from pyro_wae.step.observe import Runner


def make_runner(micro_batch: int | None, process_group: GroupLike | None) -> Runner:
    """The runner for a loss: each rank of a group runs its own data, in micro-batches or as they are.

    Raises:
        TypeError: If the group is no process group.
    """
    runner = Runner() if micro_batch is None else MicroBatches(micro_batch)
    if process_group is None:
        return runner
    check_group(process_group)
    return Ranks(process_group, runner)
