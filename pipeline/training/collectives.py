"""How the ranks of a run connect, and the control messages that they exchange besides training."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from pipeline.errors import TrainingError
from pipeline.log import logger

# Over the CPU, where processes wait while the main one saves or publishes
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# Timeout of collectives on GPUs. They wait for a rank whose shards are unavailable, which the loader retries for
# up to 14 minutes; that a process has died is noticed over the CPU.
DEVICE_TIMEOUT = timedelta(minutes=15)
# Seconds between two heartbeats
PULSE = 1.0
# Seconds that a process has to exit by itself after another one died
GRACE = 10.0


class ControlGroup:
    """Control messages between ranks, over the CPU, so that no device is waited for.

    A thread exchanges heartbeats with the other ranks. So a process exits even if its main thread hangs, for
    instance in a copy to a device that waits for a dead process.
    """

    def __init__(self, num_processes: int):
        self.size = num_processes
        self._pending: tuple[Any, Tensor] | None = None
        self._ending, self._left = threading.Event(), threading.Event()
        if num_processes > 1:
            self.group, self._alive = gloo_group(), gloo_group()
            self._listener = threading.Thread(target=self._listen, name="signs of life", daemon=True)
            self._listener.start()

    def any_rank(self, flag: bool) -> bool:
        """Whether any rank passed True one call ago, the same on all; with a single process, `flag` itself.

        Every call hands in a flag and takes the sum of the one before, which had a whole step to arrive. A process that
        died is noticed here too, however long the device's own collectives would wait for it. After a True, the
        ranks exit, each at its own time, which is not an error.
        Raises: TrainingError if another process is gone.
        """
        if self.size == 1:
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
            raise self._gone(error) from None
        if answer:
            self._ending.set()
        return answer > 0

    def broadcast(self, box: list[Any]) -> None:
        """Makes the main process's list everybody's.

        Raises: TrainingError if another process is gone.
        """
        if self.size > 1:
            try:
                dist.broadcast_object_list(box, src=0, group=self.group)
            except RuntimeError as error:
                raise self._gone(error) from None

    @contextmanager
    def leaving_on_error(self) -> Iterator[None]:
        """Within it, this process exits by its own error: what it has to finish, such as a checkpoint that is being
        written, is not cut off when the others, which have the same error, exit first.
        """
        try:
            yield
        except BaseException:
            self._left.set()
            raise

    def close(self) -> None:
        """Ends the thread; all processes call it together."""
        if self.size > 1:
            self._ending.set()
            self._listener.join()

    def _gone(self, error: RuntimeError) -> TrainingError:
        """The main thread knows, and exits by itself."""
        self._left.set()
        return TrainingError(_told(error))

    def _listen(self) -> None:
        """Exchanges heartbeats, until all processes are about to end or one of them is dead."""
        try:
            while self._num_ending() < self.size:
                self._ending.wait(PULSE)
        except RuntimeError as error:
            if not (self._ending.is_set() or self._left.wait(GRACE)):
                logger.critical(_told(error))
                os._exit(TrainingError.exit_code)

    def _num_ending(self) -> int:
        """How many processes are about to end. Raises: RuntimeError if one is dead."""
        ending = torch.tensor([int(self._ending.is_set())])
        dist.all_reduce(ending, group=self._alive)
        return int(ending)


def gloo_group() -> Any:
    """All processes once more, over the CPU."""
    return dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)


def _told(error: RuntimeError) -> str:
    return (
        f"another process of this run is gone ({str(error).splitlines()[0]}); "
        "the same command continues from the last checkpoint"
    )


def init_process_group(backend: str) -> None:
    """Joins the other processes that the launcher started.

    A launcher that restarts its processes may keep the store where they meet; what an earlier attempt left there, for
    instance the addresses of dead processes, must not count.
    """
    if not dist.is_initialized():
        store, rank, size = next(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
        store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout_of(backend))


def timeout_of(backend: str) -> timedelta:
    """How long collectives over `backend` wait for a process."""
    return DEVICE_TIMEOUT if backend == "nccl" else COLLECTIVE_TIMEOUT
