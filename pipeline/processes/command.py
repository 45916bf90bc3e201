"""How one of our processes starts another `illm`: the same Python, the same installation."""

import sys
from collections.abc import Sequence


def illm_command(words: Sequence[str], processes: int = 1) -> list[str]:
    """The command line of `illm WORDS`; with several processes, that of a launcher which starts them on this machine."""
    ours = [sys.executable, "-m", "pipeline"]
    if processes == 1:
        return [*ours, *words]
    launch = ["launch", "--multi_gpu", "--num_machines=1", "--mixed_precision=no", "--main_process_port=0"]
    return [*ours, *launch, f"--num_processes={processes}", "-m", "pipeline", *words]
