"""How a step is run: as it is, in micro-batches, over ranks."""

from __future__ import annotations

from pyro_wae.distributed import GroupLike, check_group
from pyro_wae.step.observe import Runner


def make_runner(micro_batch: int | None, process_group: GroupLike | None) -> Runner:
    """The runner for a loss: each rank of a group runs its own data, in micro-batches or as they are.

    Raises:
        TypeError: If the group is no process group.
    """
    # Imported where they are used: most trainings need neither, and `import pyro_wae` takes a tenth less.
    runner = Runner()
    if micro_batch is not None:
        from pyro_wae.runners.micro_batches import MicroBatches

        runner = MicroBatches(micro_batch)
    if process_group is None:
        return runner
    from pyro_wae.runners.ranks import Ranks

    check_group(process_group)
    return Ranks(process_group, runner)
