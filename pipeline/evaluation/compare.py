"""`illm compare`: two codecs side by side on a folder of images, with intervals."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.bitstream.codec import ImageCodec
from pipeline.evaluation import comparison, evaluator
from pipeline.evaluation.comparison import Difference
from pipeline.evaluation.held_out import HeldOut
from pipeline.models import serialization
from pipeline.registry import resolve


def run(first: str, second: str, model: str, images: str, limit: int, as_json: bool) -> str:
    """The table or JSON for the user. first, second: an alias of the model, a run folder, or a models:/ URI."""
    names = [named(word, model) for word in (first, second)]
    found = HeldOut(images, limit)
    # not under their own names: these may be paths, or the same codec twice
    codecs = {
        place: ImageCodec(serialization.load_codec(resolve.read(name, "codec")))
        for place, name in zip(("first", "second"), names, strict=True)
    }
    ids = [codec.bitstream_id.hex() for codec in codecs.values()]
    with tempfile.TemporaryDirectory() as scratch:
        results = evaluator.measure(codecs, found, len(found), Path(scratch))
    differences = comparison.differences(results.of("first"), results.of("second"))
    differences += comparison.set_differences(results, "first", "second")
    if as_json:
        told = {"images": len(found), "names": names, "bitstream_ids": ids}
        return json.dumps(told | {"metrics": [asdict(difference) for difference in differences]}, indent=1)
    files = "the same files fit both" if ids[0] == ids[1] else "neither reads the other's files"
    table = Table(title=f"{len(found)} image(s) of {images}", caption=f"bitstream ids {' and '.join(ids)}: {files}")
    for heading in ("metric", first, second, f"{first} is worse by [95 %]", "shown"):
        table.add_column(heading)
    for difference in differences:
        table.add_row(
            difference.metric,
            f"{difference.ours:.4g}",
            f"{difference.theirs:.4g}",
            str(difference.worse_by),
            with_verdict(difference),
        )
    console = Console(width=140)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip()


def named(word: str, model: str) -> str:
    """The artifact name that a word of the command line stands for."""
    return (
        word
        if word.startswith(("models:/", "shipped:")) or "/" in word or Path(word).exists()
        else f"models:/{model}@{word}"
    )


def with_verdict(difference: Difference) -> str:
    """What the interval shows about the first model."""
    if difference.worse_by.low > 0:
        return "worse"
    return "better" if difference.worse_by.high < 0 else "no difference"
