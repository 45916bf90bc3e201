"""How the processes of a run meet, and what they tell each other beside the training."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from pipeline.errors import TrainingError

PATIENCE = timedelta(minutes=30)  # of collectives: validation and saving make processes wait for each other


class Talk:
    """What processes tell each other beside the training, over the CPU, so that no device is waited for."""

    def __init__(self, num_processes: int):
        self.group: Any = dist.new_group(backend="gloo") if num_processes > 1 else None
        self._pending: tuple[Any, Tensor] | None = None

    def any_said(self, flag: bool) -> bool:
        """Whether any process said yes one call ago, the same on all; alone, what was just said.

        Every call hands in a flag and takes the sum of the one before, which had a whole step to arrive. A process that
        died is noticed here too, however long the device's own collectives would wait for it.
        Raises: TrainingError if another process is gone.
        """
        if self.group is None:
            return flag
        answer = 0
        try:
            if self._pending is not None:
                work, total = self._pending
                work.wait()
                answer = int(total)
            mine = torch.tensor([int(flag)])
            self._pending = (dist.all_reduce(mine, group=self.group, async_op=True), mine)
        except RuntimeError as error:
            raise TrainingError(
                f"another process of this run is gone ({str(error).splitlines()[0]}); "
                "the same command continues from the last checkpoint"
            ) from None
        return answer > 0

    def broadcast(self, box: list[Any]) -> None:
        """Makes the main process's list everybody's."""
        if self.group is not None:
            dist.broadcast_object_list(box, src=0, group=self.group)


def meet(backend: str) -> None:
    """Joins the other processes that the launcher started.

    A launcher that restarts its processes may keep the store where they meet; what an earlier attempt left there, for
    instance the addresses of dead processes, must not count.
    """
    if not dist.is_initialized():
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
