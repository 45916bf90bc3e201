"""Memory and time to list and plan many images: python -m tests.benchmarks.planning COUNT [FOLDER].

The list is a file of names; what examining found is made up: of a hundred files one has the bytes of the one before it, two look
like it, and one is refused. Files of some 1.2 kB per image are written to a folder in FOLDER, by default where temporary files
are. Planning runs in a process of its own, which starts no others; its row is printed as JSON.
"""

import hashlib
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from pipeline.sharding import listing
from pipeline.sharding.listing import Listing
from pipeline.sharding.passes import examined, examined_file
from pipeline.sharding.plan import plan_shards
from pipeline.stages.shard import StageConfig
from tests.support.memory import peak_resident_bytes

CHUNK = 1024


def found(number: int) -> str:
    """What examining a file found, as a worker writes it down."""
    name = f"photos/{number:09d}.jpg"
    if number % 100 == 99:
        return json.dumps(["RejectedFile", name, "images", "too small: 100x100, shorter side below 256"])
    same, alike = number % 100 == 1, number % 50 == 3
    digest = hashlib.sha256(str(number - same).encode()).digest()
    looks = int.from_bytes(hashlib.sha256(str(number - alike).encode()).digest()[:8]) ^ (alike << number % 64)
    width, size = 256 + digest[0] + digest[1], 20_000 + 1000 * digest[2]
    return json.dumps(
        ["AcceptedImage", name, "images", "jpg", size, digest.hex(), width, 512, True, "", number, looks, 1]
    )


def prepare(folder: Path, count: int) -> StageConfig:
    """Writes the list of names and, in `work`, what examining them found."""
    (folder / "work/examined").mkdir(parents=True)
    with (folder / "list.txt").open("w") as names:
        names.writelines(f"photos/{number:09d}.jpg\n" for number in range(count))
    for chunk, start in enumerate(range(0, count, CHUNK)):
        lines = "".join(f"{found(number)}\n" for number in range(start, min(start + CHUNK, count)))
        examined_file(folder / "work", chunk).write_text(lines)
    return StageConfig(source=str(folder / "list.txt"), chunk_size=CHUNK)


def measure(cfg: StageConfig, work: Path, sender: Connection) -> None:
    started = time.perf_counter()
    listing.write(work, listing.found(cfg.sources(), work))
    listed = Listing(work, cfg.chunk_size)
    then = time.perf_counter()
    plans, summary = plan_shards(cfg, examined(cfg, listed, work), work)
    row = {
        "records": listed.num_items,
        "seconds": round(time.perf_counter() - started, 1),
        "seconds_listing": round(then - started, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "peak_mb": round(peak_resident_bytes() / 1e6),
        "images": sum(split.images for split in summary.splits.values()),
        "shards": len(plans),
        "refused": summary.refused,
        "look_alikes": summary.look_alikes,
    }
    sender.send(row)


def rows(counts: list[int], place: str | None) -> Iterator[dict[str, float]]:
    context = multiprocessing.get_context("spawn")
    if place is not None:
        Path(place).mkdir(parents=True, exist_ok=True)
    for count in counts:
        with tempfile.TemporaryDirectory(dir=place) as name:
            cfg = prepare(Path(name), count)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=measure, args=(cfg, Path(name) / "work", sender))
            process.start()
            # So that its end, however it comes, ends the wait for its row
            sender.close()
            yield receiver.recv()
            process.join()


if __name__ == "__main__":
    for row in rows([int(sys.argv[1])], sys.argv[2] if len(sys.argv) > 2 else None):
        print(json.dumps(row), flush=True)
