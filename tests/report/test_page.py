"""What is on a page: which pictures, at which size, and what evaluations it takes."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ArtifactError
from pipeline.registry import resolve
from pipeline.report import content, page, pictures
from tests.conftest import assert_one_clear_line, illm_here, picture
from tests.support import evaluations
from tests.support.evaluations import plain


def noise(seed: int, height: int = 256, width: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def data_of(text: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', text)[1])


def uris_of(text: str) -> list[list[str]]:
    return [json.loads(each) for each in re.findall(r'id="pictures-\d+">(.*?)</script>', text)]


def test_pictures_that_fit_are_exact(tmp_path):
    originals = {f"i{n}": picture(n, 192, 256) for n in range(3)}
    evaluations.write(tmp_path, originals, {"a": {name: plain((1, 2, 3)) for name in originals}})
    text = page.make([content.read(tmp_path)], 10)
    found = data_of(text)
    assert [row["image"] for row in found["rows"]] == list(originals)
    for entry, uris in zip(found["pictures"], uris_of(text), strict=True):
        assert entry["models"] == ["original", "a"]
        shown = [np.asarray(Image.open(io.BytesIO(_content(uri)))) for uri in uris]
        assert np.array_equal(shown[0], originals[entry["image"]])
        assert np.array_equal(shown[1], plain((1, 2, 3)))
    assert "stored as" not in text


def _content(uri: str) -> bytes:
    return base64.b64decode(uri.partition(",")[2])


def files(tmp_path, count):
    for n in range(count):
        Image.fromarray(noise(n)).save(tmp_path / f"{n}.png")
    return [[tmp_path / f"{n}.png"] for n in range(count)]


def test_pictures_that_do_not_fit_are_coded_with_loss_and_then_left_out(tmp_path):
    rows = files(tmp_path, 6)
    exact = pictures.fit(rows, 10**9)
    assert exact.coding == "WebP without loss"
    assert exact.psnr_db is None
    size = sum(len(uri) for row in exact.uris for uri in row)
    smaller = pictures.fit(rows, size // 2)
    assert smaller.coding.startswith("AVIF")
    assert len(smaller.uris) == 6
    assert sum(len(uri) for row in smaller.uris for uri in row) <= size // 2
    assert 20 < smaller.psnr_db < 60
    fewer = pictures.fit(rows, size // 12)
    assert 1 <= len(fewer.uris) < 6
    assert sum(len(uri) for row in fewer.uris for uri in row) <= size // 12
    assert len(pictures.fit(rows, 1).uris) == 1


def test_large_pictures_are_shown_by_their_middle(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_SIDE", 100)
    whole = noise(1, 150, 120)
    Image.fromarray(whole).save(tmp_path / "large.png")
    found = pictures.fit([[tmp_path / "large.png"]], 10**9)
    assert found.cut
    shown = np.asarray(Image.open(io.BytesIO(_content(found.uris[0][0]))))
    assert np.array_equal(shown, whole[25:125, 10:110])


def test_the_worst_and_the_best_image_come_first_where_there_is_no_room_for_all(tmp_path, monkeypatch):
    # further from the original by 1, 9, 2, 8 levels
    errors = {"i0": 1, "i1": 9, "i2": 2, "i3": 8}
    originals = {name: plain((100, 100, 100)) for name in errors}
    evaluations.write(tmp_path, originals, {"a": {n: plain((100 + e,) * 3) for n, e in errors.items()}})
    seen = []
    real = pictures.fit

    def spy(rows, max_bytes):
        seen.extend(row[0].stem for row in rows)
        return real(rows[:2], max_bytes)

    monkeypatch.setattr(pictures, "fit", spy)
    text = page.make([content.read(tmp_path)], 10)
    assert seen == ["i1", "i0", "i3", "i2"]
    assert "The viewer has 2 of 4 images" in text
    assert [entry["image"] for entry in data_of(text)["pictures"]] == ["i0", "i1"]
    assert len(data_of(text)["rows"]) == 4


def test_values_intervals_and_paired_differences_are_those_of_the_files(tmp_path):
    originals = {f"i{n}": plain((100, 100, 100)) for n in range(4)}
    near = {name: plain((101, 101, 101)) for name in originals}
    far = {name: plain((100 + 2 * n,) * 3) for n, name in enumerate(originals, 1)}
    evaluations.write(tmp_path, originals, {"near": near, "far": far})
    near_model, far_model = data_of(page.make([content.read(tmp_path)], 10))["models"]
    # one level away: 20 log10(255)
    assert near_model["totals"]["psnr_db"] == pytest.approx([48.1308] * 3, abs=1e-4)
    expected = np.mean([20 * np.log10(255 / e) for e in (2, 4, 6, 8)])
    value, low, high = far_model["totals"]["psnr_db"]
    assert value == pytest.approx(expected)
    assert low < value < high
    assert near_model["worse_by"] == {}
    assert far_model["worse_by"]["psnr_db"][0] == pytest.approx(48.1308 - expected, abs=1e-4)


def test_several_evaluations_share_images_and_keep_their_models_apart(tmp_path):
    originals = {"i0": picture(1, 192, 256), "i1": picture(2, 192, 256)}
    # the same pictures under other names, and others under the same ones
    renamed = {"07-i1": originals["i1"], "08-i0": originals["i0"]}
    other = {"i0": picture(3, 192, 256), "i1": picture(4, 192, 256)}
    for name, images in (("low", originals), ("high", renamed), ("else", other)):
        made = {image: plain((9, 9, 9)) for image in images}
        evaluations.published(tmp_path / name, images, {"mine": made, "jpeg": made})
    named = [(str(tmp_path / name), _artifact(tmp_path / name)) for name in ("low", "high", "else")]
    text = page.make(content.read_several(named), 10)
    found = data_of(text)
    assert [model["key"] for model in found["models"][:3]] == ["low/mine", "low/jpeg", "high/mine"]
    assert [model["family"] for model in found["models"][:3]] == ["mine", "jpeg", "mine"]
    assert [model["set"] for model in found["models"]] == [0, 0, 0, 0, 1, 1]
    assert [model["reference"] for model in found["models"][1:4:2]] == ["low/mine", "high/mine"]
    assert [entry["image"] for entry in found["pictures"]] == ["i0", "i1", "else/i0", "else/i1"]
    assert found["pictures"][0]["models"] == ["original", "low/mine", "low/jpeg", "high/mine", "high/jpeg"]
    assert "not of the same images" in text
    assert "not of the same images" not in page.make(content.read_several(named[:2]), 10)
    with pytest.raises(ArtifactError, match="named twice"):
        content.read_several([named[0], named[0]])


def test_rates_at_equal_quality_are_compared_where_there_are_several(tmp_path):
    originals = {"i0": plain((100, 100, 100))}
    # the same qualities, the second codec at twice the bytes
    for name, level, size in (("low", 8, 100), ("mid", 4, 200), ("high", 2, 400)):
        made = {"i0": plain((100 + level,) * 3)}
        evaluations.write(tmp_path / name, originals, {"mine": made}, size)
        totals = json.loads((tmp_path / name / "totals.json").read_text())
        totals["twice"] = totals["mine"] | {"bpp": 2 * totals["mine"]["bpp"]}
        (tmp_path / name / "totals.json").write_text(json.dumps(totals))
    several = [content.read(tmp_path / name, name, f"{name}/") for name in ("low", "mid", "high")]
    found = content.bd_rates(several)
    assert found["against"] == "mine"
    assert found["rows"]["twice"]["psnr_db"] == pytest.approx(100)
    # MS-SSIM of flat pictures hardly grows: whatever is left out, nothing is made up
    assert set(found["rows"]["twice"]) <= {"psnr_db", "ms_ssim"}
    assert content.bd_rates(several[:1]) == {"against": "", "rows": {}}


def _artifact(run):
    return resolve.read(str(run), "evaluation")


def test_one_evaluation_may_hold_the_same_image_twice(tmp_path):
    same = {"i0": plain((5, 5, 5)), "i1": plain((5, 5, 5))}
    evaluations.write(tmp_path, same, {"a": same})
    assert [entry["image"] for entry in data_of(page.make([content.read(tmp_path)], 10))["pictures"]] == ["i0", "i1"]


def test_equal_images_have_an_infinite_psnr_on_the_page_too(tmp_path):
    same = {"i0": plain((5, 5, 5))}
    evaluations.write(tmp_path, same, {"a": same})
    assert data_of(page.make([content.read(tmp_path)], 10))["rows"][0]["psnr_db"] == "∞"


def test_a_page_with_many_rows_keeps_its_size(tmp_path):
    originals = {f"image-{n:04d}": noise(n, 64, 64) for n in range(150)}
    models = {f"model-{m}": originals for m in range(4)}
    evaluations.write(tmp_path, originals, models)
    text = page.make([content.read(tmp_path)], 6)
    assert 5_000_000 < len(text.encode()) <= 6_000_000
    assert len(uris_of(text)) < 150
    assert len(data_of(text)["rows"]) == 600


def test_nothing_in_the_data_can_leave_its_place(tmp_path):
    evil = "</script><script>alert(1)</script>"
    originals = {"i0": plain((1, 1, 1))}
    evaluations.write(tmp_path, originals, {"a": originals})
    known = json.loads((tmp_path / "facts.json").read_text())
    known["made"]["command"] = evil
    known["published"] = evil
    (tmp_path / "facts.json").write_text(json.dumps(known))
    text = page.make([content.read(tmp_path, evil, evil)], 10)
    assert "alert(1)</script>" not in text
    assert evil in data_of(text)["models"][0]["key"]


def test_report_writes_a_page_and_says_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    originals = {"i0": plain((1, 1, 1))}
    evaluations.published(tmp_path / "runs/a", originals, {"mine": originals})
    ended = illm_here("report", "runs/a", "-o", "page.html", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert "<title>Codec evaluation</title>" in (tmp_path / "page.html").read_text()
    assert_one_clear_line(illm_here("report", "runs/a", "-o", "page.html", cwd=tmp_path), "exists already", "--force")
    assert illm_here("report", "runs/a", "-o", "page.html", "--force", cwd=tmp_path).code == 0
    assert_one_clear_line(illm_here("report", "runs/b", cwd=tmp_path), "runs/b")
    (tmp_path / "runs/a/artifact/totals.json").write_text("{")
    assert_one_clear_line(illm_here("report", "runs/a", cwd=tmp_path), "totals.json")


def test_an_evaluation_of_an_earlier_version_still_makes_a_page(tmp_path):
    originals = {"i0": plain((1, 1, 1))}
    evaluations.write(tmp_path, originals, {"a": originals})
    for name in ("facts.json", "intervals.json"):
        (tmp_path / name).unlink()
    assert data_of(page.make([content.read(tmp_path)], 10))["models"][0]["totals"]["bpp"]
