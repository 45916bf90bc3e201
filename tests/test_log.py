"""The log: silent in libraries, plain lines on standard error at the command line."""

import logging
import os
import subprocess
import sys

import pytest

from pipeline import log
from tests.conftest import PLAIN, ROOT, illm_here

WARNS = """
import logging, sys
from pipeline import log
from pipeline.sharding import known_datasets
{setup}
list(known_datasets.checked("div2k/train", [], allow_missing=True))
"""


def warned(setup: str = "", **env: str) -> tuple[str, str]:
    """What a program that gets a warning from our library prints."""
    code = WARNS.format(setup=setup)
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=PLAIN | env, capture_output=True, text=True, check=True
    )
    return ended.stdout, ended.stderr


def test_a_library_prints_nothing_unless_its_host_configures_logging():
    assert warned() == ("", "")
    out, err = warned("logging.basicConfig(format='%(levelname)s %(name)s %(message)s')")
    assert out == ""
    assert err.startswith("WARNING illm known data set div2k/train: 800 of 800 are missing")


@pytest.mark.parametrize(
    ("setup", "env", "lines"),
    [
        ("log.install()", {}, 1),
        ("log.install(); log.install()", {}, 1),
        ("log.install(); logging.basicConfig()", {}, 1),
        ("log.install('error')", {}, 0),
        ("log.install('ERROR'); log.install('WARNING')", {}, 1),
        ("log.install()", {"RANK": "0"}, 1),
        ("log.install()", {"RANK": "1"}, 0),
    ],
)
def test_a_warning_is_one_line_of_the_first_rank(setup, env, lines):
    out, err = warned(setup, **env)
    assert out == ""
    assert [line.startswith("warning: known data set div2k/train: ") for line in err.splitlines()] == [True] * lines


def test_levels_have_their_prefixes(capsys, cli_log):
    log.logger.debug("hidden")
    log.logger.info("50% done\nand a second line")
    log.logger.warning("few images")
    log.logger.error("no such file")
    assert capsys.readouterr() == (
        "", "50% done\nand a second line\nwarning: few images\nillm: no such file\n",
    )  # fmt: skip


def test_other_ranks_say_only_what_is_their_own(capsys, cli_log, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    for level in (logging.INFO, logging.WARNING, logging.ERROR):
        log.logger.log(level, "said by rank 0")
    log.logger.warning("skipping unreadable sample", extra=log.ANY_RANK)
    log.logger.critical("another process of this run is gone")
    assert capsys.readouterr().err == (
        "warning: skipping unreadable sample\nillm: another process of this run is gone\n"
    )


def test_a_closed_standard_error_costs_the_message_and_not_the_run():
    code = "from pipeline import log; log.install(); log.logger.warning('few images'); print('continues')"
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=PLAIN, stdout=subprocess.PIPE, stderr=writer, text=True, check=False
    )
    os.close(writer)
    assert ended.stdout == "continues\n"


def test_the_command_line_takes_the_level_from_its_option_or_the_environment(tmp_path, monkeypatch):
    words = ("describe", "nothing.yaml")
    assert illm_here(*words, cwd=tmp_path).err.startswith("illm: nothing.yaml: no such config file")
    # An error is what a command ends with: no level hides it
    assert "no such config file" in illm_here("--log-level", "error", *words, cwd=tmp_path).err
    assert illm_here("--log-level", "critical", *words, cwd=tmp_path).code == 2
    monkeypatch.setenv(log.LEVEL_ENV, "ERROR")
    assert "no such config file" in illm_here(*words, cwd=tmp_path).err
    monkeypatch.setenv(log.LEVEL_ENV, "loud")
    ended = illm_here(*words, cwd=tmp_path)
    assert ended.code == 2
    assert "'--log-level' (env var: 'ILLM_LOG_LEVEL')" in ended.err
