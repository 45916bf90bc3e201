"""One trial as Ray Tune sees it: a process that is started, watched and stopped. Imports ray."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from ray import tune

from pipeline.errors import Preempted
from pipeline.processes import signals
from pipeline.processes.command import illm_command
from pipeline.storage import disk
from pipeline.sweep import trial as trials
from pipeline.sweep.space import Values
from pipeline.tracking import journal

# Seconds between two looks at a trial's process
POLL_INTERVAL_S = 0.5
# Seconds for a trial to save when it is stopped
STOP_TIMEOUT_S = 120.0
# Of the gan stage: what schedulers count
STEP = "step"
# Number in a population
MEMBER = "member"


def member(number: int) -> str:
    """Folder of a population's member."""
    return f"member-{number:02d}"


class TrialTrainable(tune.Trainable):
    """Watches a trial's process, which does the work and can be killed and started again at any time."""

    def setup(self, config: dict[str, Any], context: dict[str, Any]) -> None:  # type: ignore[override]  # Ray's own way
        self.space, self.sweep, self.here = context["space"], context["sweep"], context["here"]
        self.environment: dict[str, str] = context["environment"]
        self.process: subprocess.Popen[bytes] | None = None
        self.last: dict[str, Any] = {STEP: 0}
        # Bytes of the gan stage's records
        self.seen = 0
        if MEMBER in config:
            self.place = self.sweep / "trials" / member(self._member_of(config))
            self.values: Values = {key: value for key, value in config.items() if key != MEMBER}
        else:
            self.values = config.get("values", config)
            self.place = trials.place_of(self.sweep, self.values)
            trials.prepare(self.place, self.values)

    def _member_of(self, config: dict[str, Any]) -> int:
        """Who this is: Tune copies all of a better member's values to a worse one, its number too."""
        known = self.sweep / "tune" / f"member-of-{self.trial_id}"
        if not known.is_file():
            known.parent.mkdir(parents=True, exist_ok=True)
            disk.write_atomic(known, str(config[MEMBER]).encode())
        return int(known.read_text())

    def step(self) -> dict[str, Any]:
        """The trial's next validation, or its end."""
        if self.process is None:
            self._start()
        assert self.process is not None
        while True:
            code = self.process.poll()
            if (found := self._validated()) is not None:
                self.last = found
                return found | {"place": str(self.place)}
            if code is not None:
                return self._ended(code)
            time.sleep(POLL_INTERVAL_S)

    def _start(self) -> None:
        command = illm_command(["trial", str(self.sweep), self.place.name])
        with (self.place / "log.txt").open("ab") as log:
            environment = os.environ | self.environment | signals.die_with_parent_env()
            self.process = subprocess.Popen(command, cwd=self.here, env=environment, stdout=log, stderr=log)

    def _ended(self, code: int) -> dict[str, Any]:
        point = trials.outcome(self.place) or {}
        if code == Preempted.exit_code:
            # Tune starts it again
            raise RuntimeError("the trial was interrupted and continues")
        if code and "failed" not in point:
            told = trials.reason(code, self.place / "log.txt")
            disk.write_atomic(self.place / trials.FAILED, json.dumps({"failed": told}).encode())
        measured = {name: value for name, value in point.items() if isinstance(value, float)}
        return self.last | measured | {"place": str(self.place), "ended": True, "done": True}

    def _validated(self) -> dict[str, Any] | None:
        """The newest validation of the gan stage after the last one that was reported."""
        newest = None
        records, self.seen = journal.read(self._gan_folder(), self.seen)
        for record in records:
            metrics = record.get("metrics") or {}
            if record.get("step", 0) > self.last[STEP] and any(name.startswith("val/") for name in metrics):
                newest = {STEP: record["step"], **metrics}
        return newest

    def _gan_folder(self) -> Path:
        if self.space.scheduler.kind != "pbt":
            return self.place / "gan"
        return self.place / f"gan-{trials.generation(self.place)[0]:02d}"

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Only a pointer: checkpoints are the stage's own, in the trial's folder."""
        (Path(checkpoint_dir) / "place").write_text(str(self.place))

    def load_checkpoint(self, checkpoint_dir: str) -> None:  # type: ignore[override]  # a folder, as it was saved
        """A population's member continues from another one's checkpoint; any other trial from its own folder anyway."""
        donor = Path((Path(checkpoint_dir) / "place").read_text())
        if donor != self.place:
            trials.exploit_from(self.place, donor, self.values)

    def cleanup(self) -> None:
        """Tune stops this trial: its stage saves and ends."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
