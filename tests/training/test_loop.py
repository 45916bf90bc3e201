"""The loop on a network of one weight: what it does with steps that are not finite."""

import gzip
import json
import os
import shutil
import signal
import threading
import time

import pytest
import torch

from pipeline.artifacts import ownership
from pipeline.data.batch import Batch
from pipeline.errors import ArtifactError, Preempted, TakenOver, TrainingError
from pipeline.processes import signals
from pipeline.training import checkpoint
from pipeline.training.loop import FitConfig, fit
from pipeline.training.metrics import MetricAverager
from pipeline.training.optim import AdamConfig
from pipeline.training.runtime import Runtime


class Line:
    """Fits w to 1; the steps in `bad` have a loss that is not finite."""

    def __init__(self, runtime: Runtime, steps: int, bad: set[int]):
        self.runtime, self.network = runtime, torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.network.weight)
        self.trainable = runtime.trainable("line", self.network, AdamConfig(lr=0.1), steps)
        self.bad, self.weights = bad, []

    def train_step(self, parts: list[Batch], step: int) -> dict[str, torch.Tensor]:
        self.weights.append(self.network.weight.item())
        x = torch.full((1, 1), float("inf") if step in self.bad else 1.0)
        loss = (self.trainable.model(x) - 1).square().mean()
        self.trainable.backward(loss)
        norm = self.trainable.update(step)
        return {"train/loss": loss.detach(), "train/line_norm": norm}

    def validate(self) -> dict[str, float]:
        return {"val/w": self.network.weight.item()}

    def export(self, folder) -> None: ...


def batches(start: int):
    while True:
        yield Batch(torch.zeros(1, 3, 1, 1), [start], [0])
        start += 1


def train(folder, steps: int, bad: set[int], **settings: int) -> tuple[Line, dict[str, float], dict]:
    runtime = Runtime()
    task = Line(runtime, steps, bad)
    logged: dict[int, dict[str, float]] = {}
    cfg = FitConfig(steps=steps, log_every=5, checkpoint_every=5, validate_every=100, **settings)
    with ownership.held(folder) as still_ours:
        log = lambda step, m: logged.setdefault(step, {}).update(m)
        metrics = fit(task, batches, runtime, folder, cfg, log, still_ours)
    return task, metrics, logged


def test_a_step_that_is_not_finite_changes_nothing_and_is_told(tmp_path, capsys, cli_log):
    task, metrics, logged = train(tmp_path, 20, bad={6, 7})
    assert task.weights[6] == task.weights[7] == task.weights[8]  # the weight before steps 6, 7 and 8
    assert len(set(task.weights)) == 20 - 2
    clean, _, _ = train(tmp_path / "clean", 18, bad=set())
    assert task.network.weight.item() == clean.network.weight.item()  # moments and their age were left alone too
    assert metrics["val/w"] == task.network.weight.item()
    assert logged[10]["train/skipped_steps"] == 2
    assert 0 < logged[10]["train/loss"] < 1  # the mean of the three good ones
    assert "train/skipped_steps" not in logged[5] | logged[15]
    assert "skipped 2 of 5 steps before step 10: train/loss, train/line_norm not finite" in capsys.readouterr().err


def test_who_lost_its_run_folder_writes_no_checkpoint(tmp_path, monkeypatch):
    """For instance on a node that the cluster held for dead, after another one took over."""
    take_step = Line.train_step

    def train_step(task, parts, step):
        if step == 7:
            ownership.acquire(tmp_path)
        return take_step(task, parts, step)

    monkeypatch.setattr(Line, "train_step", train_step)
    with pytest.raises(TakenOver, match="taken over by process"):
        train(tmp_path, 20, bad=set())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000005"]


def signalled(monkeypatch, *numbers: int) -> None:
    """Sends this process signals in step 7 of the training."""
    take_step = Line.train_step

    def train_step(task, parts, step):
        for number in numbers if step == 7 else ():
            os.kill(os.getpid(), number)
        return take_step(task, parts, step)

    monkeypatch.setattr(Line, "train_step", train_step)


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGTERM,),
        (signal.SIGHUP,),
        (signal.SIGINT,),
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGTERM, signal.SIGINT, signal.SIGHUP),
    ],
)
def test_signals_that_ask_to_stop_save_a_checkpoint(tmp_path, monkeypatch, restored_handlers, numbers):
    monkeypatch.setattr(signals, "_TOGETHER", 0.0)
    signalled(monkeypatch, *numbers)
    with pytest.raises(Preempted, match="preempted at step 8; a checkpoint was saved, the same command continues"):
        train(tmp_path, 20, bad=set())
    assert checkpoint.restore(tmp_path)[0].step == 8


def test_ctrl_c_three_times_does_not_wait(tmp_path, monkeypatch, restored_handlers):
    monkeypatch.setattr(signals, "_TOGETHER", 0.0)
    signalled(monkeypatch, *[signal.SIGINT] * 3)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 20, bad=set())


def test_a_launcher_that_passes_ctrl_c_on_makes_no_second_one_of_it(tmp_path, monkeypatch, restored_handlers):
    signalled(monkeypatch, *[signal.SIGINT] * 4)
    with pytest.raises(Preempted):
        train(tmp_path, 20, bad=set())


def test_what_a_process_was_started_to_ignore_stays_ignored(tmp_path, monkeypatch, restored_handlers):
    """As under nohup, or in the background of a script."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signalled(monkeypatch, signal.SIGHUP, signal.SIGINT)
    train(tmp_path, 20, bad=set())
    assert signal.getsignal(signal.SIGHUP) == signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_a_removed_run_folder_is_told(tmp_path, monkeypatch):
    take_step = Line.train_step

    def train_step(task, parts, step):
        if step == 7:
            # At once: another thread may be writing a checkpoint into it
            (tmp_path / "run").rename(tmp_path / "gone")
        return take_step(task, parts, step)

    monkeypatch.setattr(Line, "train_step", train_step)
    with pytest.raises(ArtifactError, match="run: was removed while process"):
        train(tmp_path / "run", 20, bad=set())


def test_too_many_in_a_row_stop_the_stage_and_the_last_checkpoint_is_good(tmp_path):
    with pytest.raises(
        TrainingError,
        match=r"4 steps in a row before step 10 had to be skipped: train/loss, train/line_norm not finite",
    ):
        train(tmp_path, 20, bad={5, 6, 7, 8}, max_skipped_steps=3)
    progress, state = checkpoint.restore(tmp_path)
    assert progress.step == 5
    assert state["line"]["model"]["weight"].isfinite().all()


def saved_steps(folder) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


def test_within_a_row_of_bad_steps_no_checkpoint_replaces_a_good_one(tmp_path):
    train(tmp_path, 20, bad={8, 9, 10}, keep_checkpoints=9)
    assert saved_steps(tmp_path) == [5, 15, 20]


def test_a_validation_that_is_not_finite_is_neither_saved_nor_published(tmp_path):
    class Spoilt(Line):
        def validate(self) -> dict[str, float]:
            return {"val/w": float("nan")}

    for _ in range(2):  # the same command says the same
        task = Spoilt(Runtime(), 20, set())
        cfg = FitConfig(steps=20, checkpoint_every=5, validate_every=10)
        with pytest.raises(TrainingError, match="validation at step 10: val/w not finite; nothing was written"):
            fit(task, batches, task.runtime, tmp_path, cfg, lambda step, metrics: None)
        assert saved_steps(tmp_path) == [5]


def test_an_error_waits_for_the_checkpoint_that_is_being_written(tmp_path, monkeypatch):
    written = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *given: (time.sleep(0.5), written(*given)))
    with pytest.raises(TrainingError):
        train(tmp_path, 20, bad={5, 6, 7, 8}, max_skipped_steps=3)
    assert saved_steps(tmp_path) == [5]


def test_weights_are_looked_at_where_nothing_is_validated(tmp_path):
    class Spoilt(Line):
        def train_step(self, parts: list[Batch], step: int) -> dict[str, torch.Tensor]:
            super().train_step(parts, step)
            if step == 7:
                self.network.weight.data.fill_(torch.inf)
            return {"train/loss": torch.zeros(())}

    task = Spoilt(Runtime(), 20, set())
    cfg = FitConfig(steps=20, checkpoint_every=5, validate_every=100)
    with pytest.raises(TrainingError, match="weights are not finite at step 10; no checkpoint was written"):
        fit(task, batches, task.runtime, tmp_path, cfg, lambda step, metrics: None)
    assert saved_steps(tmp_path) == [5]


def test_as_many_as_allowed_in_a_row_do_not_stop_it_even_across_two_logs(tmp_path):
    train(tmp_path, 20, bad={3, 4, 5, 6}, max_skipped_steps=4)
    with pytest.raises(TrainingError):
        train(tmp_path / "more", 20, bad={3, 4, 5, 6, 7}, max_skipped_steps=4)


def test_a_full_disk_does_not_stop_training_until_the_last_checkpoint(small_disk, capsys, cli_log):
    class Freeing(Line):
        """Too large for the disk while a file of another program lies there, which is gone at step 12."""

        def __init__(self, runtime: Runtime, steps: int):
            super().__init__(runtime, steps, set())
            self.filler = small_disk / "filler"
            self.filler.write_bytes(bytes(100_000))

        def train_step(self, parts: list[Batch], step: int) -> dict[str, torch.Tensor]:
            if step == 12:
                for saving in [thread for thread in threading.enumerate() if thread.name == "checkpoint"]:
                    saving.join()
                self.filler.unlink()
            return super().train_step(parts, step)

    runtime = Runtime()
    task = Freeing(runtime, 20)
    cfg = FitConfig(steps=20, log_every=5, checkpoint_every=5, validate_every=100)
    fit(task, batches, runtime, small_disk / "run", cfg, lambda step, metrics: None)
    told = capsys.readouterr().err
    assert "no checkpoint at step 5: No space left on device; training continues" in told
    assert "no checkpoint at step 10" in told
    assert "no checkpoint at step 15" not in told
    assert checkpoint.restore(small_disk / "run")[0].step == 20
    shutil.rmtree(small_disk / "run")
    task = Freeing(Runtime(), 20)
    with pytest.raises(OSError, match="No space left"):
        fit(
            task,
            batches,
            task.runtime,
            small_disk / "again",
            FitConfig(steps=10, checkpoint_every=5),
            lambda s, m: None,
        )


def test_metrics_are_means_over_steps():
    window = MetricAverager(Runtime(), 0)
    for value in (1.0, 2.0, 6.0):
        window.add({"a": torch.tensor(value), "b": torch.tensor(-value)})
    assert window.take(3) == {"a": 3.0, "b": -3.0}
    window.add({"a": torch.tensor(5.0), "b": torch.tensor(0.0)})
    assert window.take(4) == {"a": 5.0, "b": 0.0}


def test_a_spike_is_skipped_and_told_where_that_is_asked_for(tmp_path, capsys, cli_log):
    class Spiking(Line):
        def __init__(self, runtime: Runtime, steps: int, spikes: set[int], skip: float | None):
            super().__init__(runtime, steps, set())
            self.trainable = runtime.trainable(
                "spiking", self.network, AdamConfig(lr=1e-4, skip_grad_spikes=skip), steps
            )
            self.spikes = spikes

        def train_step(self, parts: list[Batch], step: int) -> dict[str, torch.Tensor]:
            self.weights.append(self.network.weight.item())
            self.trainable.backward(self.trainable.model(torch.ones(1, 1)).sum() * (1e4 if step in self.spikes else 1))
            return {"train/line_norm": self.trainable.update(step)}

    for name, skip, told in (("on", 10.0, True), ("off", None, False)):
        runtime = Runtime()
        task = Spiking(runtime, 130, {120}, skip)
        fit(task, batches, runtime, tmp_path / name, FitConfig(steps=130, log_every=10), lambda s, m: None)
        assert (task.weights[120] == task.weights[121]) is told
        assert ("skipped 1 of 10 steps before step 130: train/line_norm" in capsys.readouterr().err) is told


def test_a_trace_of_some_steps_can_be_asked_for(tmp_path, capsys, cli_log):
    train(tmp_path, 10, bad=set(), profile_steps=2)
    (path,) = tmp_path.glob("trace-step-*.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert sum("AdamW.step" in event.get("name", "") for event in events) == 2
    assert "ui.perfetto.dev" in capsys.readouterr().err


def test_speed_and_memory_are_logged_without_validation_and_saving(tmp_path):
    class Slow(Line):
        def validate(self) -> dict[str, float]:
            time.sleep(1)
            return super().validate()

    runtime = Runtime()
    task, logged = Slow(runtime, 20, set()), {}
    cfg = FitConfig(steps=20, log_every=5, validate_every=5, checkpoint_every=10)
    fit(task, batches, runtime, tmp_path, cfg, lambda step, m: logged.setdefault(step, {}).update(m))
    assert all(logged[step]["system/images_per_s"] > 5 for step in (10, 15, 20))  # with validation it would be less
    assert logged[10]["system/checkpoint_stall_s"] < 0.5
    assert 0 <= logged[10]["system/data_wait_fraction"] < 1
    assert logged[10]["system/peak_memory_gb"] > 0.1


def test_a_save_goes_on_beside_training_and_keeps_what_was_then(tmp_path, monkeypatch):
    going_on = threading.Event()
    written = checkpoint.save

    def slow_save(*args: object) -> None:
        assert going_on.wait(10)
        written(*args)

    monkeypatch.setattr(checkpoint, "save", slow_save)
    saver = checkpoint.Saver(tmp_path, keep=2, keep_every=None)
    weight = torch.ones(3)
    saver.save(checkpoint.TrainProgress(1, 1), {"w": weight}, needed=True)
    weight.zero_()  # training goes on while the save has not even begun to write
    going_on.set()
    saver.wait()
    assert torch.equal(checkpoint.restore(tmp_path)[1]["w"], torch.ones(3))
