"""Which rates files get, by `rate.kind`: python -m tests.benchmarks.calibrated SHARDS [STEPS]

The package's codec of medium quality learns on for STEPS steps (300) at a rate that was asked for, by the stage `pretrain` with
configs/small/pretrain-mine.yaml, and then compresses the photos of SHARDS that were held out. Writes
docs/results/calibrated.json. Runs go to runs/calibrated and resume.
"""

import statistics
import sys
from pathlib import Path

from pipeline.evaluation.measurement import read_csv
from tests.benchmarks.short_runs import evaluated, illm, write_rows

TARGET = Path("docs/results/calibrated.json")
RUNS = Path("runs/calibrated")
ASKED = {
    f"{kind}-{bpp}": (kind, bpp, f"{{kind: {kind}, bpp: {bpp}{more}}}")
    for bpp in (0.25,)
    for kind, more in (("calibrated", ", weight: 0.8"), ("target", ", warmup_steps: 0"))
}


def trained(name: str, rate: str, shards: str, steps: int) -> str:
    """Trains it if it is not trained yet; returns its run folder."""
    run = str(RUNS / name)
    validation = ["data.num_validation_crops=14", "data.validation_crop_size=512", "fit.validate_every=50"]
    # Averaged weights, of which files are made, would lag behind the price of a bit
    learning = ["optimizer.lr=2e-4", "engine.ema_decay=null"]
    words = [f"run={run}", f"data.shards={shards}", f"rate={rate}", f"fit.steps={steps}", *learning, *validation]
    illm("pretrain", "configs/small/pretrain-mine.yaml", *words)
    return run


def measured(codecs: dict[str, str], shards: str) -> dict[str, list[tuple[float, float]]]:
    """Bits per pixel of each photo's file, and its PSNR in dB, by codec."""
    found: dict[str, list[tuple[float, float]]] = {}
    for one in read_csv(evaluated(RUNS, shards, codecs) / "per_image.csv"):
        found.setdefault(one.model, []).append((one.bpp, one.psnr_db))
    return found


def table(rows: list[dict[str, object]]) -> str:
    """As docs/training.md shows it."""
    lines = [
        "| rate | requested | mean of files | off by | lowest, highest photo | PSNR, dB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        asked, mean, lowest, highest, psnr = (float(row[k]) for k in ("asked", "bpp", "lowest", "highest", "psnr_db"))  # type: ignore[arg-type]
        off = f"{100 * (mean / asked - 1):+.0f} %"
        lines.append(
            f"| `{row['kind']}` | {asked:.2f} | {mean:.3f} | {off} | {lowest:.3f}, {highest:.3f} | {psnr:.2f} |"
        )
    return "\n".join(lines)


def main(shards: str, steps: str = "300") -> None:
    codecs = {name: trained(name, rate, shards, int(steps)) for name, (_, _, rate) in ASKED.items()}
    files = measured(codecs, shards)
    rows: list[dict[str, object]] = []
    for name, (kind, asked, _) in ASKED.items():
        bpp, psnr = zip(*files[name], strict=True)
        row = {"kind": kind, "asked": asked, "steps": int(steps), "photos": len(bpp)}
        mean = {
            "bpp": statistics.fmean(bpp),
            "lowest": min(bpp),
            "highest": max(bpp),
            "psnr_db": statistics.fmean(psnr),
        }
        rows.append(row | mean)
    write_rows(TARGET, rows)
    print(table(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
