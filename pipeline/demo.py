"""`illm demo`: every stage in turn, each as the command a user would type, then the promoted codec at work."""

import shlex
import subprocess
import sys
from pathlib import Path

from pipeline import artifacts, config, runs, stages, tracking
from pipeline.data.reader import ShardReader
from pipeline.errors import UserError


class StageFailed(UserError):
    """A stage's command ended with an error that it has already told."""

    def __init__(self, stage: str, code: int):
        super().__init__(
            f"demo: the stage {stage!r} stopped with exit code {code}; `make demo` again continues from there"
        )
        self.exit_code = code


def run(configs: Path, folder: Path, data: str | None) -> None:
    """Runs all stages of `configs` in subfolders of `folder`, then compresses and decompresses a held-out photo.

    Raises: StageFailed with the stage's exit code.
    """
    for stage, overrides in _overrides(folder, data).items():
        cfg = config.load(stages.get(stage).StageConfig, configs / f"{stage}.yaml", overrides)
        if done := runs.finished(folder / stage, cfg):
            print(f"{stage}: already done: {done}", flush=True)
        else:
            _illm(stage, str(configs / f"{stage}.yaml"), f"run={folder / stage}", *overrides)
    _summary(folder)


def _overrides(folder: Path, data: str | None) -> dict[str, list[str]]:
    """Stage -> overrides that connect it to the others inside `folder`."""
    shards, codec = f"data.shards={folder / 'shard'}", str(folder / "pretrain")
    return {
        "shard": [f"source={data}"] if data else [],
        "vqvae": [shards],
        "pretrain": [shards],
        "gan": [shards, f"codec={codec}", f"labeler={folder / 'vqvae'}"],
        "evaluate": [f"images={folder / 'shard'}", f"codecs={{pretrained: {codec}, fine-tuned: {folder / 'gan'}}}"],
        "promote": [f"evaluation={folder / 'evaluate'}"],
    }


def _illm(*words: str) -> None:
    print(f"\n$ illm {shlex.join(words)}", flush=True)
    ended = subprocess.run([sys.executable, "-m", "pipeline", *words], check=False)
    if ended.returncode:
        raise StageFailed(words[0], ended.returncode)


def _summary(folder: Path) -> None:
    from pipeline.stages.evaluate import print_table

    shards = artifacts.read(str(folder / "shard"), "shards")
    evaluation = artifacts.read(str(folder / "evaluate"), "evaluation")
    decision = artifacts.read(str(folder / "promote"), "promotion").json("decision.json")
    model = f"models:/{decision['name']}@{decision['alias']}"

    reader = ShardReader(shards, "valid")
    sample, content = next(reader.first(1))
    photo = folder / "try" / f"{Path(sample.source).stem}.{sample.extension}"
    photo.parent.mkdir(parents=True, exist_ok=True)
    photo.write_bytes(content)
    compressed, restored = photo.with_suffix(".illm"), photo.with_name(f"{photo.stem}-restored.png")
    _illm("compress", str(photo), str(compressed), "--codec", model)
    _illm("decompress", str(compressed), str(restored), "--codec", model)

    print()
    totals = evaluation.json("totals.json")
    print_table(totals, len(reader))
    print(f"report           {evaluation.path / 'report.html'}")
    print(f"registered       {decision['name']} version {decision['version']}, alias {decision['alias']} ({model})")
    print(f"look at the runs {tracking.page_command()}", flush=True)
