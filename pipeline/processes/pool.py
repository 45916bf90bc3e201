"""Runs one function over many chunks of work: in threads, in processes of this machine, or on a Ray cluster."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context, parent_process
from typing import Literal, TypeVar

from pipeline.processes import ray_session

T = TypeVar("T")
R = TypeVar("R")
Backend = Literal["auto", "threads", "processes", "ray"]
# Times in a row that workers may die without a chunk being finished in between
RETRIES = 3
# Chunks; fewer are done before other processes have imported what they need
WORTH_PROCESSES = 16


def map_chunks(
    work: Callable[[T], R], chunks: Sequence[T], workers: int, on: Backend = "auto"
) -> Iterator[tuple[int, R]]:
    """Each chunk's number with `work(chunk)`, in the order in which they finish.

    `work` must give the same result wherever and however often it is called; for processes and Ray it is pickled.
    """
    if not chunks:
        return
    match backend_for(on, len(chunks), workers):
        case "ray":
            yield from _on_ray(work, chunks, workers)
        case "processes":
            yield from _in_processes(work, chunks, workers)
        case _:
            yield from _in_threads(work, chunks, workers)


def backend_for(on: Backend, num_chunks: int, workers: int) -> Backend:
    """What "auto" stands for: the Ray cluster that RAY_ADDRESS names; else processes for much work, threads for little."""
    if on != "auto":
        return on
    if "RAY_ADDRESS" in os.environ:
        return "ray"
    return "processes" if workers > 1 and num_chunks >= WORTH_PROCESSES else "threads"


def _in_threads(work: Callable[[T], R], chunks: Sequence[T], workers: int) -> Iterator[tuple[int, R]]:
    _keep_freed_memory()
    with ThreadPoolExecutor(workers) as pool:
        try:
            yield from _in_pool(pool, work, chunks, range(len(chunks)), 2 * workers)
        finally:
            pool.shutdown(cancel_futures=True)


def _in_pool(
    pool: Executor, work: Callable[[T], R], chunks: Sequence[T], numbers: Iterable[int], at_once: int
) -> Iterator[tuple[int, R]]:
    """The chunks of these numbers; few are handed over at a time, so that few results wait."""
    left, waiting = iter(numbers), dict[Future[R], int]()
    while True:
        for number in islice(left, at_once - len(waiting)):
            waiting[pool.submit(work, chunks[number])] = number
        if not waiting:
            return
        for done in wait(waiting, return_when=FIRST_COMPLETED).done:
            yield waiting.pop(done), done.result()


def _in_processes(work: Callable[[T], R], chunks: Sequence[T], workers: int) -> Iterator[tuple[int, R]]:
    left, retries = set(range(len(chunks))), 0
    while left:
        # Not fork: a child of a process with threads may hang in a lock that another thread held
        pool = ProcessPoolExecutor(
            min(workers, len(left)), mp_context=get_context("forkserver"), initializer=_begin_process
        )
        try:
            for number, result in _in_pool(pool, work, chunks, sorted(left), 2 * workers):
                left.remove(number)
                retries = 0
                yield number, result
        except BrokenProcessPool:
            retries += 1
            if retries > RETRIES:
                raise
        finally:
            pool.shutdown(cancel_futures=True)


def _begin_process() -> None:
    _keep_freed_memory()
    _end_with_parent()


def _keep_freed_memory() -> None:
    """Lets glibc keep the memory of an image for the next one: up to 62 MB.

    It returns what is free beyond twice the largest block, below 32 MB, that was freed so far. An image takes several such blocks.
    So in a new process its pages go back to the kernel, which clears those of the next image: a quarter of the time.
    """
    block = bytearray(31 << 20)
    del block


def _end_with_parent() -> None:
    """Ends this worker as soon as the process that started it is gone, however that ended."""

    def watch() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _on_ray(work: Callable[[T], R], chunks: Sequence[T], workers: int) -> Iterator[tuple[int, R]]:
    with ray_session.running(workers):
        import ray

        @ray.remote(num_cpus=1, max_retries=RETRIES)
        def task(chunk: T) -> R:
            _keep_freed_memory()
            return work(chunk)

        at_once = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        waiting: dict[ray.ObjectRef[R], int] = {}
        numbers = iter(range(len(chunks)))
        while True:
            for number in numbers:
                waiting[task.remote(chunks[number])] = number
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
