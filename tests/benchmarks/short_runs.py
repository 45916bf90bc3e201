"""Trainings of minutes, which pilots.py and others compare: each is a stage's command, and resumes."""

import json
import subprocess
import sys
from pathlib import Path

import yaml


def illm(*words: str) -> None:
    """Runs a command of this version to its end."""
    subprocess.run([sys.executable, "-m", "pipeline", *words], check=True)


def recorded(run: Path) -> dict[str, list[float]]:
    """Each metric's values in the order in which a run recorded them."""
    found: dict[str, list[float]] = {}
    for line in (run / "tracking.jsonl").read_text(encoding="utf-8").splitlines():
        for name, value in json.loads(line).get("metrics", {}).items():
            found.setdefault(name, []).append(value)
    return found


def validated(run: Path) -> dict[str, float]:
    """What the last validation of a finished run measured."""
    metrics: dict[str, float] = json.loads((run / "artifact/manifest.json").read_text(encoding="utf-8"))["metrics"]
    return metrics


def evaluated(runs: Path, images: str, codecs: dict[str, str]) -> Path:
    """Measures codecs on files of some images, in the run folder runs/evaluate; returns its artifact."""
    config = {"stage": "evaluate", "images": images, "codecs": codecs, "anchors": [], "metrics": ["lpips"]}
    (runs / "evaluate.yaml").write_text(yaml.safe_dump(config))
    illm("evaluate", str(runs / "evaluate.yaml"), f"run={runs / 'evaluate'}")
    return runs / "evaluate/artifact"


def write_rows(target: Path, rows: list[dict[str, object]]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
