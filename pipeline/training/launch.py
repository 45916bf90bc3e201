"""`accelerate launch` for our stages: `illm launch [options of accelerate launch] -m pipeline STAGE ...`.

Two things that Accelerate's own command does not do: stop signals reach the ranks, which save and exit, and its exit code
is theirs. So a job script can tell a preempted stage (75) from a failed one.
"""

import logging
import os
import signal
import subprocess
from collections.abc import Sequence

import psutil
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from pipeline.errors import Preempted
from pipeline.log import logger
from pipeline.processes.signals import STOP_SIGNALS, forward_signals


def launch(words: Sequence[str]) -> int:
    """Starts the ranks and waits for them; returns their exit code. words: what `accelerate launch` takes."""
    args = launch_command_parser().parse_args(list(words))
    # its messages about ranks that end are printed here, and by the ranks
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    # on other signals torch's launcher kills the ranks after 30 seconds; SIGQUIT remains for an immediate stop
    args.signals_to_handle = "SIGQUIT"
    with forward_signals(lambda: [child.pid for child in psutil.Process().children()]) as received:
        return _launch(args, received)


def _launch(args: object, received: list[int]) -> int:
    try:
        launch_command(args)
    except ChildFailedError as failed:
        codes = {rank: failure.exitcode for rank, failure in failed.failures.items()}
    except subprocess.CalledProcessError as failed:
        # A single process is started without torch's launcher
        codes = {0: failed.returncode}
    else:
        return 0
    if received and all(code == Preempted.exit_code or -code in STOP_SIGNALS for code in codes.values()):
        # A rank that the signal ended had not begun to train
        return Preempted.exit_code
    # The others were ended by the launcher because of one of these
    own = [code for code in codes.values() if code > 0]
    if not own:
        told = ", ".join(f"rank {rank} by signal {-code}" for rank, code in codes.items())
        hint = "; 9 is often a lack of memory" if -signal.SIGKILL in codes.values() else ""
        logger.error(f"launch: ended on {os.uname().nodename}: {told}{hint}")
    return max(own, default=1)
