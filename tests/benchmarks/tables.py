"""Writes the tables of benchmarks in the docs from the rows in docs/bench: `make tables`.

A table stands between `<!-- rows: NAMES -->` and `<!-- end of rows -->`. NAMES are groups of cpu.json, or `gpus`: then every
other file is a machine, with a heading and its tables.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE, BENCH = ROOT / "docs/performance.md", ROOT / "docs/bench"
PAGES = (PAGE, *(ROOT / f"docs/{name}.md" for name in ("bitstream", "data", "evaluation", "scaling")))
BETWEEN = re.compile(r"(<!-- rows: (?P<names>[^>]+) -->\n).*?(<!-- end of rows -->)", re.DOTALL)
Row = dict[str, object]

# Group of a machine's file -> heading, in the order of the page
HEADINGS = {
    "steps": "Steps",
    "reference": "",
    "variants": "Options",
    "batches": "Number of crops",
    "same": "Equal bits",
    "training": "From shards",
    "ranks": "Several ranks",
    "zero": "ZeRO",
    "numerics": "Against the CPU in fp32",
    "photos": "Photos",
    "small": "Small networks",
    "kernels": "Single kernels",
}
COLUMNS = {
    "crops_per_s": "crops/s",
    "start_ms": "CPU enqueues, ms",
    "first_s": "first steps, s",
    "peak_gb": "GB",
    "gpu_ms": "GPU busy, ms",
    "share_of_bound": "share of the bf16 bound",
    "forward_ms": "forward, ms",
    "both_ms": "forward and backward, ms",
    "forward_gb_s": "forward, GB/s",
    "forward_tflop_s": "forward, TFLOP/s",
    "left_out": "left out",
}
# What every row says of itself
ABOUT = ("group", "name", "hardware", "versions", "command", "date")
PEER = "published implementation"
TOGETHER = "gan step, bf16, together:"
FASTEST = f"gan step, bf16, {PEER}; ours with fused_norms, pad_channels and labels in bf16"


def written(page: str) -> str:
    """The page with its tables as the rows are now."""
    return BETWEEN.sub(lambda found: f"{found[1]}\n{tables(found['names'].split())}\n{found[3]}", page)


def tables(names: list[str]) -> str:
    if names == ["gpus"]:
        files = sorted(path for path in BENCH.glob("*.json") if path.stem != "cpu")
        return "\n".join(machine(json.loads(path.read_text(encoding="utf-8"))) for path in files)
    rows = json.loads((BENCH / "cpu.json").read_text(encoding="utf-8"))
    return comparison([row for name in names for row in rows if row["group"] == name])


def comparison(rows: list[Row]) -> str:
    """Rows of `make bench`, under what they were measured on and with."""
    lines = [[row["name"], row["ours"], row["peer_name"], row["peer"], row["ratio"], row["unit"]] for row in rows]
    table = markdown(["what", "ours", "against", "that", "ratio", "unit"], lines, measured)
    return f"{made(rows)}\n\n{table}"


def made(rows: list[Row]) -> str:
    """On what machine, with what, when and how rows were made."""
    said = []
    for row in rows:
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items() if name != "platform")  # type: ignore[attr-defined]
        when = f"; {row['date']}" if "date" in row else ""
        said.append(f"{row['hardware']}; {versions}{when}; {code(str(row['command']))}")
    return "  \n".join(dict.fromkeys(said))


def code(command: str) -> str:
    return f"`{command}`" if "make" in command else command


def machine(rows: list[Row]) -> str:
    """All tables of a GPU."""
    name = str(rows[0]["hardware"]).split(",")[0]
    parts = [f"### {name}\n", made(rows), "\n#### Targets of the GAN step\n", targets(rows)]
    for group, heading in HEADINGS.items():
        found = [row for row in rows if row["group"] == group]
        if group == "steps":
            parts += [f"\n#### {heading}\n", steps(rows)]
            parts += ["\nMilliseconds of the GPU by kind of kernel:\n", kinds(rows)]
        elif found and heading:
            table = generic(found)
            long = len(found) > 20
            parts += [f"\n#### {heading}\n"] + (["<details><summary>all of them</summary>\n"] if long else []) + [table]
            parts += ["\n</details>"] if long else []
    compared = [row for row in rows if "ours" in row]
    parts += ["\n#### Comparisons\n", comparison(compared)] if compared else []
    return "\n".join(parts) + "\n"


def steps(rows: list[Row]) -> str:
    """Each step with its two settings of determinism, and the published implementation's."""
    lines = []
    for name in dict.fromkeys(match[1] for row in rows if (match := is_step(row))):
        free, exact, peer = (named(rows, f"{name}, {how}") for how in ("not deterministic", "deterministic", PEER))
        mine = peer.get("ours_ms", free.get("ms"))
        lines.append([
            name, free.get("ms"), exact.get("ms"), peer.get("ms"), ratio(peer.get("ms"), mine), free.get("crops_per_s"),
            free.get("start_ms"), free.get("share_of_bound"), free.get("peak_gb"), peer.get("peak_gb"), bad(free, exact, peer),
        ])  # fmt: skip
    headings = [
        "step", "not deterministic, ms", "deterministic (default), ms", "published, ms", "ratio", "crops/s",
        "CPU enqueues, ms", "share of the bf16 bound", "GB", "published, GB", "",
    ]  # fmt: skip
    return markdown(headings, lines)


def is_step(row: Row) -> re.Match[str] | None:
    return re.fullmatch(r"(\w+ step, \w+), not deterministic", str(row["name"])) if row["group"] == "steps" else None


def kinds(rows: list[Row]) -> str:
    found = [row for row in rows if row["group"] == "steps" and "gpu_ms_by_kind" in row]
    names = list(dict.fromkeys(kind for row in found for kind in row["gpu_ms_by_kind"]))  # type: ignore[attr-defined]
    lines = [
        [row["name"], row["gpu_ms"], row["kernels"], *(row["gpu_ms_by_kind"].get(kind) for kind in names)]  # type: ignore[attr-defined]
        for row in found
    ]
    return markdown(["step", "all", "kernels", *names], lines)


def targets(rows: list[Row]) -> str:
    """What was asked of the GAN step, and what it reached in fp32, in bf16, and in bf16 with the options that help."""
    ours, theirs, parts = [], [], []
    together = next((row for row in rows if str(row["name"]).startswith(TOGETHER)), {})
    for peer, alone in (
        (named(rows, f"gan step, fp32, {PEER}"), named(rows, "gan step, fp32, not deterministic")),
        (named(rows, f"gan step, bf16, {PEER}"), named(rows, "gan step, bf16, not deterministic")),
        (named(rows, FASTEST), together),
    ):
        ours.append((peer.get("ours_ms", alone.get("ms")), peer.get("ours_peak_gb", alone.get("peak_gb"))))
        theirs.append((peer.get("ms"), peer.get("peak_gb")))
        parts.append(alone.get("share_of_bound"))
    speed = [[ratio(theirs[n][0], mine) for mine, _ in ours] for n in (0, 1)]
    memory = [ratio(mine, peer) for (_, mine), (_, peer) in zip(ours, theirs, strict=True)]
    return markdown(
        ["", "target", "fp32", "bf16", "bf16 with options"],
        [
            ["speed, in parts of the published fp32 step's", "at least 3", *speed[0]],
            ["speed, in parts of the published bf16 step's", "at least 1.8", None, *speed[1][1:]],
            ["memory, in parts of the published step's", "at most 0.6", *memory],
            ["share of the bf16 bound", "at least 0.5", None, *parts[1:]],
        ],
    )


def generic(rows: list[Row]) -> str:
    """A column for each number or text that a row of these has."""
    keys = [key for row in rows for key, value in row.items() if key not in ABOUT and not isinstance(value, dict)]
    keys = list(dict.fromkeys(keys))
    return markdown(
        ["what", *(COLUMNS.get(key, key.replace("_", " ")) for key in keys)],
        [[row["name"], *(row.get(key) for key in keys)] for row in rows],
    )


def named(rows: list[Row], name: str) -> Row:
    return next((row for row in rows if row["name"] == name), {})


def ratio(above: object, below: object) -> float | None:
    return above / below if isinstance(above, int | float) and isinstance(below, int | float) else None


def bad(*rows: Row) -> object:
    return next((row[key] for row in rows for key in ("failed", "left_out") if key in row), None)


def markdown(headings: list[str], lines: list[list[object]], form: object = None) -> str:
    """A table without its empty columns."""
    kept = [n for n, _ in enumerate(headings) if n == 0 or any(line[n] not in (None, "") for line in lines)]
    show = measured if form else digits
    rows = [headings, ["---"] * len(headings), *([show(value) for value in line] for line in lines)]
    return "\n".join("| " + " | ".join(row[n] for n in kept) + " |" for row in rows)


def measured(value: object) -> str:
    """A figure of the CPU's tables."""
    if not isinstance(value, int | float):
        return str(value or "")
    return f"{value:.0f}" if value >= 10 else f"{value:.2f}"


def digits(value: object) -> str:
    """A figure with three digits."""
    if value is None or isinstance(value, bool | str):
        return "" if value is None else str(value)
    assert isinstance(value, int | float)
    return f"{value:.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"written: {page.relative_to(ROOT)}")
