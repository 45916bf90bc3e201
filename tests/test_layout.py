"""Every stage has its configurations, what the documents name exists, and no file is long."""

import re

from pipeline import stages
from tests.conftest import ROOT

SOURCES = sorted((ROOT / "pipeline").rglob("*.py"))


def test_every_stage_has_help_a_config_and_a_make_target():
    makefile = (ROOT / "Makefile").read_text()
    for stage in stages.STAGES:
        assert re.search(rf"^(stage-)?{stage}:.*##", makefile, re.M), stage
        if stage != "sweep":
            for folder in ("", "demo", "demo-from-nothing", "smoke"):
                assert (ROOT / "configs" / folder / f"{stage}.yaml").is_file()


def documents() -> str:
    return "\n".join(
        p.read_text() for p in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "jobs/README.md"]
    )


def test_make_targets_named_in_the_documents_exist():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))
    named = {
        word
        for line in re.findall(r"`make ([^`]*)`|^(?: {4,}|\$ )make (.*)$", documents(), re.M)
        for word in re.sub('"[^"]*"', "", "".join(line).split("#")[0]).split()
    }
    assert {w for w in named if re.fullmatch(r"[a-z][a-z-]+", w)} <= targets


def test_files_named_in_the_documents_exist():
    named = set(
        re.findall(
            r"(?:configs|jobs|docs|pipeline|tests|requirements)/[\w./-]*\w\.(?:yaml|py|sh|sbatch|md|txt|html|csv)",
            documents(),
        )
    )
    assert named
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_no_file_is_long_and_none_is_called_utils():
    for path in SOURCES:
        assert len(path.read_text().splitlines()) <= 300, path
        assert path.stem not in ("utils", "common", "helpers", "base", "core")
