"""What one worker of the shard stage does at a time: fetch some images and examine them."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Semaphore

from pipeline import disk, redaction
from pipeline.data import fetch, room
from pipeline.data.examine import Lists, Photo, Refusal, Rules, examine
from pipeline.data.images import pixels_in
from pipeline.data.sources import Item
from pipeline.errors import DataError, UnreachableError
from pipeline.wording import printable

FETCHED_AT_ONCE = 8  # by each worker


def examine_piece(
    items: list[Item], rules: Rules, lists: Lists, spool: Path, max_bytes: int, threads: int = 1
) -> list[Photo | Refusal]:
    """Examines some items; keeps the bytes of accepted ones that came over a network.

    threads: images that are decoded at a time; more are fetched.
    """
    decoders = Semaphore(threads)

    def one(item: Item) -> Photo | Refusal:
        try:
            content = fetch.read(item, max_bytes)
        except UnreachableError as error:
            why = printable(redaction.masked(str(error).removeprefix(f"{item.location}: ")))
            return Refusal(item.name, item.dataset, f"unreadable: {why}")
        except DataError as error:
            return Refusal(item.name, item.dataset, item.problem or f"unreadable: {error}")
        with decoders, room.for_image(pixels_in(content), spool):
            result = examine(item.name, item.dataset, content, rules, lists)
        if isinstance(result, Photo) and fetch.is_url(item.location):
            disk.write_durably(spool / result.sha256, content)
        return result

    remote = any(fetch.is_url(item.location) for item in items)
    with ThreadPoolExecutor(FETCHED_AT_ONCE if remote else threads) as pool:
        return list(pool.map(one, items))
