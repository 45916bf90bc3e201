"""Ctrl-C at the command line, and commands that are waited for."""

import os
import signal
import sys

import pytest
import typer

from pipeline.cli import app
from pipeline.processes import signals


def test_a_second_ctrl_c_lets_the_cleaning_up_end(monkeypatch, restored_handlers):
    monkeypatch.setattr(signals, "_TOGETHER", 0.0)
    signals.clean_up_when_interrupted()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # while it cleans up
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_is_told(capsys):
    command_line = typer.Typer()

    @command_line.command()
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert app.exit_code(lambda: command_line([])) == 130
    assert "interrupted; the same command starts again" in capsys.readouterr().err


SAVES = """
import signal, sys, time
signal.signal(signal.{name}, lambda *_: sys.exit(75))
open(sys.argv[1], "w").close()
time.sleep(60)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGTERM"])
def test_a_command_gets_the_signal_and_is_waited_for(tmp_path, restored_handlers, name):
    started = tmp_path / "started"
    command = [sys.executable, "-c", SAVES.format(name=name), str(started)]
    script = f"while [ ! -e {started} ]; do sleep 0.05; done; kill -{name.removeprefix('SIG')} {os.getpid()}"
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", script], os.environ)
    assert signals.run(command, {}) == (75, [getattr(signal, name)])
    os.waitpid(pid, 0)
