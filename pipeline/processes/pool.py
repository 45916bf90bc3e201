"""Runs one function over many pieces of work: in threads of this process, or on a Ray cluster."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Literal, TypeVar

from pipeline.processes import ray_session

T = TypeVar("T")
R = TypeVar("R")
Backend = Literal["auto", "threads", "ray"]
RETRIES = 3  # of a piece whose worker died
WORTH_RAY = 16  # pieces; fewer are done before Ray has started


def map_chunks(
    work: Callable[[T], R], pieces: Sequence[T], workers: int, on: Backend = "auto"
) -> Iterator[tuple[int, R]]:
    """Each piece's number with `work(piece)`, in the order in which they finish.

    on: "auto" is the cluster that RAY_ADDRESS names, else a Ray of our own if there are many pieces and more than one
    worker, else threads. `work` must give the same result wherever and however often it is called.
    """
    many = workers > 1 and len(pieces) >= WORTH_RAY
    if not pieces or on == "threads" or (on == "auto" and not many and "RAY_ADDRESS" not in os.environ):
        with ThreadPoolExecutor(workers) as pool:
            waiting = {pool.submit(work, piece): number for number, piece in enumerate(pieces)}
            try:
                for done in as_completed(waiting):
                    yield waiting[done], done.result()
            finally:
                pool.shutdown(cancel_futures=True)
        return
    yield from _on_ray(work, pieces, workers)


def _on_ray(work: Callable[[T], R], pieces: Sequence[T], workers: int) -> Iterator[tuple[int, R]]:
    with ray_session.running(workers):
        import ray

        @ray.remote(num_cpus=1, max_retries=RETRIES)
        def task(piece: T) -> R:
            return work(piece)

        at_once = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        waiting: dict[ray.ObjectRef[R], int] = {}
        numbers = iter(range(len(pieces)))
        while True:
            for number in numbers:
                waiting[task.remote(pieces[number])] = number
                if len(waiting) >= at_once:
                    break
            if not waiting:
                return
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            number = waiting.pop(done)
            try:
                result = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.as_instanceof_cause() from None
            yield number, result
