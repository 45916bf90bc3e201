"""The plan on disk: the same as with all images in memory, whatever the images are."""

import errno
import fcntl
import hashlib
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.sharding import plan
from pipeline.sharding.config import ShardConfig
from pipeline.sharding.filters import AcceptedImage, RejectedFile
from pipeline.sharding.sources import Source
from pipeline.storage import sorting
from tests.sharding.planning import image, planned, reference, results_of

WEIGHTS = {"a": 1.0, "b": 1.5, "c": 0.4}


def config(**options: object) -> ShardConfig:
    return ShardConfig(**{"source": "photos", "validation_fraction": 0.2} | options)


@st.composite
def images(draw: st.DrawFn) -> AcceptedImage | RejectedFile:
    """Of few digests, few hashes and few sizes, so that many are equal, alike, or equally large."""
    number, source = draw(st.integers(0, 30)), draw(st.sampled_from("abc"))
    path = f"{source}/{draw(st.integers(0, 99))} \udcff.jpg"
    if draw(st.integers(0, 9)) == 0:
        return RejectedFile(path, source, "too small")
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    return AcceptedImage(
        path, source, draw(st.sampled_from(["jpg", "png"])), draw(st.integers(1, 9)) * 100_000, digest,
        draw(st.sampled_from([300, 400])), 300, False, draw(st.sampled_from(["", "deep"])), hash=draw(st.integers(0, 255)) << 20,
    )  # fmt: skip


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    found=st.lists(images(), min_size=1, max_size=60),
    distance=st.sampled_from([None, 0, 1, 3]),
    drop=st.booleans(),
    fractions=st.sampled_from([(0.0, 0.0), (0.3, 0.2), (1e-9, 0.0), (1 - 1e-9, 0.0), (0.2, 0.8 - 1e-9)]),
    sides=st.sampled_from([(None, None, None), ("valid", None, None), ("train", "test", None)]),
)
def test_a_plan_is_the_one_that_was_made_in_memory(tmp_path, found, distance, drop, fractions, sides):
    sources = [Source(name=n, path=n, weight=w, split=s) for (n, w), s in zip(WEIGHTS.items(), sides, strict=True)]
    cfg = config(
        source=sources, duplicate_distance=distance, drop_near_duplicates=drop, validation_fraction=fractions[0],
        test_fraction=fractions[1], shard_mb=1.0,
    )  # fmt: skip
    results = results_of(found, WEIGHTS)
    with pytest.MonkeyPatch.context() as patch:
        # Many small files to merge, in several rounds
        patch.setattr(sorting, "RUN_BYTES", 1500)
        patch.setattr(sorting, "MERGED", 3)
        try:
            expected = reference(cfg, results)
        except LookupError:
            with pytest.raises(DataError, match=rf"none of {len(found)} files is a usable image"):
                planned(cfg, results, tmp_path)
        else:
            assert planned(cfg, results, tmp_path) == expected


def test_a_plan_of_two_thousand_images_is_the_one_of_version_0_1(tmp_path):
    """The digest was computed by the code of before, which sorted in memory."""
    assert digest_of_plan(tmp_path) == "0faa08018953c98e7ee88e2718849662b000e8254dfad4f95182e4bc235e1433"


def digest_of_plan(folder) -> str:
    rng = np.random.default_rng(0)
    found: list[AcceptedImage | RejectedFile] = []
    for number in range(2000):
        if number % 50 == 0:
            found.append(RejectedFile(f"{number}.jpg", "a", "too small"))
            continue
        same, source = number - (number % 20 == 7), "abc"[int(rng.integers(3))]
        looks = int(rng.integers(2**63)) if number % 10 else found[-1].hash ^ 5
        found.append(image(same, f"{source}/{number}.jpg", source, looks, size=int(rng.integers(10_000, 500_000))))
    sources = [Source(name=name, path=name, weight=weight) for name, weight in WEIGHTS.items()]
    made = planned(config(source=sources, shard_mb=5.0), results_of(found, WEIGHTS), folder)
    lines = [
        f"{name} {photo.sha256} {photo.repeats} {photo.path} {item.location}"
        for name, shard in made.shards.items()
        for photo, item in shard
    ]
    lines += [f"{refusal.path} {refusal.reason}" for refusal in made.refused]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_the_memory_of_a_plan_hardly_grows_with_the_number_of_images(tmp_path, monkeypatch):
    monkeypatch.setattr(sorting, "RUN_BYTES", 2**14)

    def peak(count: int) -> int:
        """Bytes, numpy's included."""
        results = (results_of([image(number)])[0] for number in range(count))
        tracemalloc.start()
        plan.plan_shards(config(shard_mb=0.1), results, tmp_path / f"{count}")
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    for count in (500, 1000, 4000):
        (tmp_path / f"{count}").mkdir()
    # What is made once
    peak(500)
    # A record alone takes 250 bytes as text, and 570 as objects
    assert peak(4000) - peak(1000) < 3000 * 120


def test_equal_files_are_kept_once(tmp_path):
    made = planned(config(), results_of([image(1, "b.png"), image(1, "a.png"), image(1, "c.png")]), tmp_path)
    assert made.paths("") == ["b.png"]
    assert [refusal.reason for refusal in made.refused] == ["same bytes as b.png"] * 2


def test_an_image_stays_on_its_side_of_the_split_when_others_are_added(tmp_path):
    few, many = (planned(config(), results_of([image(i) for i in range(n)]), tmp_path) for n in (50, 500))
    assert set(few.paths("valid")) <= set(many.paths("valid"))
    assert 60 < many.splits["valid"] < 140
    assert many.splits["train"] + many.splits["valid"] == 500


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_two_images_give_both_sides_one(tmp_path, share):
    made = planned(config(validation_fraction=share), results_of([image(1), image(2)]), tmp_path)
    assert made.splits == {"train": 1, "valid": 1, "test": 0}


def test_of_look_alikes_the_largest_is_kept_and_then_the_first_by_digest(tmp_path):
    alike = sorted((image(n, looks=5) for n in range(6)), key=lambda photo: photo.sha256)
    alike = [replace(photo, width=300 + 100 * (n % 2)) for n, photo in enumerate(alike)]
    made = planned(config(drop_near_duplicates=True), results_of(alike[::-1]), tmp_path)
    assert made.paths("") == [alike[1].path]
    # Files that were refused are listed from the largest to the smallest
    assert [refusal.path for refusal in made.refused] == [alike[n].path for n in (3, 5, 0, 2, 4)]
    assert {refusal.reason for refusal in made.refused} == {f"looks like {alike[1].path}"}


def test_refused_files_come_by_reason_and_then_in_their_order(tmp_path):
    small = [RejectedFile(f"{n}.png", "a", "too small") for n in (9, 1, 5)]
    other = next(n for n in range(99) if selection_place(n) > 0.4)
    found = [image(other, "left out", "c"), small[0], image(7, "first"), small[1], image(7, "second"), small[2]]
    sources = [Source(name=name, path=name, weight=weight) for name, weight in WEIGHTS.items()]
    made = planned(config(source=sources), results_of(found, WEIGHTS), tmp_path)
    assert [refusal.path for refusal in made.refused] == ["9.png", "1.png", "second", "5.png", "left out"]


def selection_place(number: int) -> float:
    """In [0, 1): a source of smaller weight leaves the image out."""
    digest = image(number).sha256
    return int(hashlib.sha256(f"weight {digest}".encode()).hexdigest()[:8], 16) / 2**32


@pytest.mark.parametrize("damage", ["summary gone", "summary cut", "images cut", "refused gone"])
def test_a_damaged_plan_is_made_again(tmp_path, damage):
    results = results_of([image(n) for n in range(40)])
    plans, summary = plan.plan_shards(config(shard_mb=0.001), iter(results), tmp_path)
    folder = tmp_path / plan.FOLDER
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    name = {"summary": plan.SUMMARY, "images": "train.jsonl", "refused": plan.REFUSED}[damage.split()[0]]
    if damage.endswith("gone"):
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(whole[name][:-9])
    assert plan.plan_shards(config(shard_mb=0.001), iter(results), tmp_path) == (plans, summary)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert {path.name for path in tmp_path.iterdir()} == {"plan", "plan.lock"}


@pytest.mark.parametrize(("locks", "there"), [(True, False), (False, False), (False, True)])
def test_jobs_that_plan_at_once_have_one_plan(tmp_path, monkeypatch, locks, there):
    """there: with a part of a plan in the way, as a power cut leaves it."""
    results = results_of([image(n) for n in range(40)])
    together = threading.Barrier(1 if locks else 6)
    made = []

    def slow() -> Iterator[tuple]:
        made.append(1)
        together.wait(60)
        yield from results

    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    if not locks:
        monkeypatch.setattr(fcntl, "flock", refused)
    for work in (tmp_path / str(n) for n in range(1 if locks else 10)):
        made.clear()
        (work / plan.FOLDER).mkdir(parents=True)
        if there:
            (work / plan.FOLDER / "train.jsonl").write_text("{}\n")
        with ThreadPoolExecutor(6) as pool:
            jobs = [pool.submit(plan.plan_shards, config(), slow(), work) for _ in range(6)]
            (first, *others) = [job.result() for job in jobs]
        assert others == [first] * 5
        assert len(made) == (1 if locks else 6)
        assert len([photo for each in first[0] for photo in each.photos()]) == 40
        assert {path.name for path in work.iterdir()} == {plan.FOLDER, f"{plan.FOLDER}.lock"}


@pytest.mark.parametrize("others", [39, 40])
def test_a_plan_that_was_replaced_is_told(tmp_path, others):
    """Also by one of fewer images, whose lines still fit, and by one of other images in lines of the same lengths."""

    def made(numbers: range) -> list[plan.Plan]:
        plan.remove(tmp_path)
        return plan.plan_shards(config(validation_fraction=0), iter(results_of([image(n) for n in numbers])), tmp_path)[
            0
        ]

    (before,) = made(range(10, 50))
    assert len(before.photos()) == 40
    for replace_it in (lambda: plan.remove(tmp_path), lambda: made(range(50 - others + 1, 51))):
        replace_it()
        with pytest.raises(DataError, match=r"train.jsonl: replaced by another job"):
            before.photos()


def test_many_jobs_may_remove_a_plan_at_once(tmp_path):
    """As the tasks of an array do at their start."""
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            (tmp_path / plan.FOLDER).mkdir()
            list(pool.map(lambda _: plan.remove(tmp_path), range(16)))
    assert list(tmp_path.iterdir()) == []
