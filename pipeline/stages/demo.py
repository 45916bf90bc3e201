"""`illm demo`: every stage in turn, each as the command a user would type, then the promoted codec at work."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import config, stages
from pipeline.artifacts import run_folder
from pipeline.artifacts.artifact import manifest_at
from pipeline.data.reader import ShardReader
from pipeline.errors import GatesNotMet, StageFailed
from pipeline.processes import signals
from pipeline.processes.command import illm_command
from pipeline.registry import aliases, resolve
from pipeline.stages import plan
from pipeline.text import file_name
from pipeline.tracking import page, store
from pipeline.tracking.run import run_group

# Then the codec after each of the two trainings is promoted
CHAIN = ("shard", "vqvae", "pretrain", "gan", "evaluate")
# Run folders of the two promotions
FIRST, SECOND = "promote-pretrained", "promote"
# Of how many held-out photos, and where
SHOWN, PICTURE = 3, "try/side-by-side.png"


def run(configs: Path, folder: Path, data: str | None) -> None:
    """Runs all stages of `configs` in subfolders of `folder`, then uses the promoted codec and rolls it back and forth.

    Raises: StageFailed with the stage's exit code.
    """
    about = f"All stages of `illm demo {configs}`, in `{folder}`; the runs below this one are the stages."
    steps = plan.plan(CHAIN, configs, folder, [f"shard.source={data}"] if data else [])
    with run_group("demo", folder, about) as pipeline:
        for step in steps:
            _stage(step.stage, folder / step.stage, configs, step.overrides, pipeline.environment)
        pipeline.log(_headline(folder))
        for name, overrides in ((FIRST, ["codec=pretrained"]), (SECOND, [])):
            words = [f"evaluation={folder / 'evaluate'}", *overrides]
            if _stage("promote", folder / name, configs, words, pipeline.environment) == GatesNotMet.exit_code:
                print(f"{name}: the champion stays; the gates above say why", flush=True)
    _use(folder)
    _pictures(folder)
    _roll_back(folder)
    _summary(folder)


def _headline(folder: Path) -> dict[str, float]:
    """What the stages ended with, for the run that holds theirs: its charts are what MLflow's page shows first."""
    found: dict[str, float] = {}
    for stage in CHAIN:
        manifest = manifest_at(resolve.path_of(str(folder / stage)), str(folder / stage))
        found |= {
            f"{stage}/{name.replace('/', ' ')}": value for name, value in manifest.metrics.items() if value is not None
        }
    return found


def _stage(stage: str, folder: Path, configs: Path, overrides: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs a stage unless it is done; returns its exit code, 0 or, for the second promotion, that of gates that are not met."""
    path = configs / f"{stage}.yaml"
    if done := run_folder.finished(folder, config.load(stages.get(stage).StageConfig, path, overrides)):
        print(f"{folder.name}: already done: {done}", flush=True)
        return 0
    return _illm([stage, str(path), f"run={folder}", *overrides], environment, may_refuse=folder.name == SECOND)


def _illm(words: Sequence[str], environment: Mapping[str, str] | None = None, may_refuse: bool = False) -> int:
    print(f"\n$ illm {shlex.join(words)}", flush=True)
    code, _ = signals.run(illm_command(words), environment or {})
    if code and not (may_refuse and code == GatesNotMet.exit_code):
        again = "`make demo` again continues from there"
        raise StageFailed(f"demo: the stage {words[0]!r} stopped with exit code {code}; {again}", code)
    return code


def _use(folder: Path) -> None:
    """Compresses and decompresses a held-out photo with the champion."""
    model = f"models:/{_decision(folder)['name']}@champion"
    reader = ShardReader(resolve.read(str(folder / "shard"), "shards"), "valid")
    sample, content = next(reader.first(1))
    photo = folder / "try" / f"{file_name(Path(sample.source).stem)}.{sample.extension}"
    photo.parent.mkdir(parents=True, exist_ok=True)
    photo.write_bytes(content)
    compressed, restored = photo.with_suffix(".illm"), photo.with_name(f"{photo.stem}-restored.png")
    # Left by an earlier demo
    for before in (compressed, restored):
        before.unlink(missing_ok=True)
    _illm(["compress", str(photo), str(compressed), "--codec", model])
    _illm(["decompress", str(compressed), str(restored), "--codec", model])


def _pictures(folder: Path) -> None:
    """Crops of held-out photos: the originals, and what all codecs made of them."""
    from pipeline.report import side_by_side

    evaluation = resolve.read(str(folder / "evaluate"), "evaluation")
    models = list(evaluation.json("totals.json"))
    names = sorted(path.stem for path in (evaluation.path / "reconstructions/original").iterdir())[:SHOWN]
    rows = [side_by_side.row(evaluation.path, name, models) for name in names]
    side_by_side.stacked(rows).save(folder / PICTURE)


def _roll_back(folder: Path) -> None:
    """Goes back to the first champion and forth again, once, if the second codec took its place."""
    name = _decision(folder)["name"]
    if (folder / SECOND / "artifact").is_dir():
        second = _decision(folder, SECOND)["version"]
        was_shown = any(c.action == "rollback" and c.end == "done" for c in aliases.history(name, "champion"))
        if not was_shown and aliases.current(name, "champion") == second:
            _illm(["rollback", name, "--reason", "to show how"])
        if aliases.current(name, "champion") != second:
            _illm(["rollback", name, "--to", second, "--reason", "the fine-tuned codec again"])
    _illm(["history", name])


def _decision(folder: Path, promotion: str = FIRST) -> dict[str, Any]:
    return resolve.read(str(folder / promotion), "promotion").json("decision.json")


def _summary(folder: Path) -> None:
    from pipeline.evaluation.metric_table import print_table

    evaluation = resolve.read(str(folder / "evaluate"), "evaluation")
    totals = evaluation.json("totals.json")
    name = _decision(folder)["name"]
    print()
    print_table(totals, len(ShardReader(resolve.read(str(folder / "shard"), "shards"), "valid")))
    print(f"pictures         {folder / PICTURE}")
    print(f"report           {evaluation.path / 'report.html'}")
    print(f"registered       {name}: version {aliases.current(name, 'champion')} is models:/{name}@champion")
    print(f"made from        illm lineage models:/{name}@champion")
    print(f"look at the runs {page.command()}")
    print(f"                 {page.address(store.experiment(store.client()))}", flush=True)
