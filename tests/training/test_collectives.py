"""Two processes that talk: what the one left behind does."""

import os
import signal
import subprocess
import sys
from datetime import timedelta

import pytest

from pipeline.storage import fetch
from pipeline.training import collectives
from tests.conftest import ROOT
from tests.support.ranks import free_port

pytestmark = pytest.mark.dist

RANK = """
import sys, threading
from pipeline import log
from pipeline.training import collectives as talk

log.install()
talk.GRACE = float(sys.argv[1])
talk.init_process_group("gloo")
talks = talk.ControlGroup(2)
answers = [talks.any_rank(False) for _ in range(5)]
"""
# The main thread waits for something that never comes, as it does in a copy to a device whose stream hangs
HANGS = "print('hangs', flush=True)\nthreading.Event().wait()"
# One says yes: both hear it one call later, and then talk no more
STOPS = """
import os
flag = os.environ["RANK"] == "1"
print(answers, talks.any_rank(flag), talks.any_rank(False), talks.any_rank(False), flush=True)
talks.broadcast([None])
talks.close()
print("listening" if talks._listener.is_alive() else "closed", flush=True)
os._exit(0)
"""


# Both have the same error; the second leaves at once, the first has something to finish
FINISHES = """
import os
try:
    with talks.leaving_on_error():
        raise ValueError
except ValueError:
    if os.environ["RANK"] == "0":
        talks._listener.join()  # it has noticed that the other is gone
        print("finished", flush=True)
    os._exit(0)
"""
# The second one's weight is another
DIFFERS = """
import os, torch
from pipeline.training.optim import AdamConfig
from pipeline.training.runtime import Runtime
talks.close()
runtime = Runtime()
module = torch.nn.Linear(2, 2)
runtime.trainable("line", module, AdamConfig(lr=1.0), 10)
runtime.check_weights(6)
module.weight.data[0, 0] += int(os.environ["RANK"])
runtime.check_weights(7)
runtime.close()
os._exit(0)
"""


def start_two(program: str, grace: float) -> list[subprocess.Popen]:
    port = str(free_port())
    common = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK + program, str(grace)],
            env=os.environ | common | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip


def test_a_process_whose_main_thread_hangs_leaves_when_another_one_died():
    left, victim = start_two(HANGS, grace=0.5)
    for rank in (left, victim):
        assert rank.stdout is not None
        assert rank.stdout.readline() == "hangs\n"
    os.kill(victim.pid, signal.SIGKILL)
    victim.communicate()
    _, told = left.communicate(timeout=300)
    assert left.returncode == 2
    assert "illm: another process of this run is gone (" in told
    assert "the same command continues from the last checkpoint" in told


def test_both_hear_a_yes_one_call_later_and_the_listener_ends():
    ranks = start_two(STOPS, grace=60)
    for rank in ranks:
        out, err = rank.communicate(timeout=300)
        assert rank.returncode == 0, err
        assert out.splitlines() == ["[False, False, False, False, False] False True False", "closed"]


def test_an_error_of_all_cuts_off_nothing_that_one_has_to_finish():
    finishing, leaving = start_two(FINISHES, grace=0.5)
    leaving.communicate(timeout=300)
    out, err = finishing.communicate(timeout=300)
    assert (finishing.returncode, out) == (0, "finished\n"), err


def test_processes_that_drifted_apart_are_told():
    outcomes = [(rank.communicate(timeout=300), rank.returncode) for rank in start_two(DIFFERS, grace=60)]
    assert [code for _, code in outcomes] == [0, 0], outcomes
    told = [err for (_, err), _ in outcomes]
    assert [text.count("ranks hold different weights at step") for text in told] == [1, 0]
    assert "different weights at step 7; those of rank 0 are saved" in told[0]


def test_devices_wait_longer_than_the_loader_may_and_less_than_the_cpu():
    pauses = [min(fetch.FIRST_RETRY_S * 2**n, fetch.MAX_RETRY_S) * 1.5 for n in range(fetch.TRAINING_ATTEMPTS - 1)]
    at_worst = timedelta(seconds=sum(pauses) + fetch.TRAINING_ATTEMPTS * fetch.TIMEOUT)
    assert at_worst < collectives.timeout_of("nccl") < collectives.timeout_of("gloo")
