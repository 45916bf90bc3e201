"""Ray for as long as it is needed: the cluster that RAY_ADDRESS names, or one of our own."""

import logging
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from pipeline import redaction
from pipeline.errors import UserError
from pipeline.text import printable


@contextmanager
def running(workers: int | None = None) -> Iterator[None]:
    """Ray is running within it. workers: processors of a Ray of our own, by default all.

    Ray listens on every network interface, whatever address it is given, and runs what it is sent. So one of our own requires
    a token that only this process and those it starts know. Import ray inside: it looks for the token when it is imported.
    Raises: UserError if RAY_ADDRESS is a URL.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"RAY_ADDRESS={printable(redaction.masked(address))} is where jobs are submitted, expected HOST:6379, the cluster; "
            "name the other one in RAY_API_SERVER_ADDRESS"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    known = "ray" not in sys.modules or _token.cache_info().currsize
    if known and not {"RAY_ADDRESS", "RAY_AUTH_MODE"} & set(os.environ):
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _token()}
    import ray

    started_here = not ray.is_initialized()
    if started_here and "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)
    elif started_here:
        # "local" keeps Ray from looking for a cluster that is gone
        ray.init("local", num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        if started_here:
            ray.shutdown()


# Ray keeps to the token it found first
@cache
def _token() -> str:
    return secrets.token_hex(32)
