"""The page in a real Chromium: what it shows, pixel by pixel, and what a reader's hands and keys do."""

import io
import shutil
import time
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from pipeline.report import content, page
from tests.conftest import picture
from tests.support import evaluations
from tests.support.evaluations import plain

pytestmark = pytest.mark.browser

RED, BLUE, GRAY = (200, 10, 10), (10, 10, 200), (103, 103, 103)
HEIGHT, WIDTH = 192, 256


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs requirements/browser.txt")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Three gray images through a red, a blue and a nearly gray codec, and a fourth one that nobody changed."""
    folder = tmp_path_factory.mktemp("evaluation")
    originals = {f"i{n}": plain((100, 100, 100), HEIGHT, WIDTH) for n in range(3)}
    models = {
        "red": {name: plain(RED) for name in originals},
        "blue": {name: plain(BLUE) for name in originals},
        # i1 is the worst
        "gray": {name: plain((103 + (20 if name == "i1" else n),) * 3) for n, name in enumerate(originals)},
    }
    exact = picture(9, HEIGHT, WIDTH)
    evaluations.write(folder, originals | {"i3": exact}, {m: made | {"i3": exact} for m, made in models.items()})
    path = folder / "report.html"
    page.write(path, [content.read(folder)], 10)
    return path


@pytest.fixture
def opened(chromium, report):
    """Opens the page; whatever it prints, throws or asks for fails the test."""
    contexts, complaints = [], []

    def open_it(width=1400, height=900, path=report, anchor="", **options):
        context = chromium.new_context(viewport={"width": width, "height": height}, accept_downloads=True, **options)
        contexts.append(context)
        view = context.new_page()
        address = path.as_uri()
        view.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        view.on("pageerror", lambda error: complaints.append(str(error)))
        view.on(
            "request",
            lambda r: (
                None
                if r.url.split("#")[0] == address or r.url.startswith(("data:", "blob:"))
                else complaints.append(r.url)
            ),
        )
        view.goto(address + anchor)
        view.wait_for_selector("#stage[data-ready]")
        return view

    yield open_it
    for context in contexts:
        context.close()
    assert not complaints


def compare(view, left, right, mode="split", image="i0"):
    view.select_option("#image", image)
    view.wait_for_selector(f'#stage[data-ready^="{image} "]')
    view.select_option("#left", left)
    view.select_option("#right", right)
    view.click(f"[data-mode={mode}]")
    view.wait_for_selector(f'#stage[data-ready="{image} {left} {right} {mode}"]')


def until(view, condition):
    """Waits in Python: the page forbids the evaluation that Playwright's own waiting needs."""
    deadline = time.monotonic() + 20
    while not view.evaluate(condition):
        assert time.monotonic() < deadline, condition
        view.wait_for_timeout(50)


def seen(view, across, down=0.5):
    """The color of the screen at a fraction of the stage's width and height."""
    shot = np.asarray(Image.open(io.BytesIO(view.locator("#stage").screenshot())).convert("RGB"))
    return tuple(int(value) for value in shot[int(down * shot.shape[0]), int(across * shot.shape[1])])


def drag(view, start, end, down=0.8):
    box = view.locator("#stage").bounding_box()
    at = [(box["x"] + across * box["width"], box["y"] + down * box["height"]) for across in (start, end)]
    view.mouse.move(*at[0])
    view.mouse.down()
    view.mouse.move(*at[1], steps=5)
    view.mouse.up()


def headings(view, table):
    return view.locator(f"{table} thead button").all_inner_texts()


def column(view, table, number):
    return view.locator(f"{table} tbody tr td:nth-child({number})").all_inner_texts()


@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen_in_the_readers_colors(opened, width, scheme):
    view = opened(width, 844, color_scheme=scheme, reduced_motion="reduce")
    assert view.evaluate("document.documentElement.scrollWidth") == width
    background = view.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    assert view.locator(".plot .main-svg").count() >= 3
    view.click("#theme")
    assert view.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    view.click("#theme")
    assert view.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"


def test_left_of_the_line_is_the_left_codec_and_the_line_moves(opened):
    view = opened()
    compare(view, "red", "blue")
    assert seen(view, 0.4) == RED
    assert seen(view, 0.6) == BLUE
    drag(view, 0.5, 0.7)
    assert seen(view, 0.6) == RED
    assert seen(view, 0.72, 0.2) == BLUE
    # by keys, from the line
    view.locator("#split").focus()
    for _ in range(10):
        view.keyboard.press("ArrowLeft")
    assert int(view.locator("#split").get_attribute("aria-valuenow")) == 50
    assert seen(view, 0.6) == BLUE
    view.click("#swap")
    view.wait_for_selector('#stage[data-ready="i0 blue red split"]')
    assert seen(view, 0.4) == BLUE


def test_a_finger_moves_the_line(opened):
    view = opened(390, 844, has_touch=True, is_mobile=True)
    compare(view, "red", "blue")
    session = view.context.new_cdp_session(view)
    view.locator("#stage").scroll_into_view_if_needed()
    box = view.locator("#stage").bounding_box()
    down = box["y"] + box["height"] / 2
    for kind, across in (("touchStart", 0.5), ("touchMove", 0.3), ("touchMove", 0.2), ("touchEnd", None)):
        points = [] if across is None else [{"x": box["x"] + across * box["width"], "y": down}]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    assert int(view.locator("#split").get_attribute("aria-valuenow")) == pytest.approx(20, abs=2)
    assert seen(view, 0.4, 0.2) == BLUE


def test_panes_show_the_same_part_at_the_same_scale(opened):
    view = opened()
    compare(view, "red", "blue", "side")
    assert [seen(view, x) for x in (1 / 6, 1 / 2, 5 / 6)] == [(100, 100, 100), RED, BLUE]
    transforms = "[...document.querySelectorAll('#stage .layer')].map(layer => layer.style.transform)"
    view.click("#zoom-one")
    assert view.locator("#zoom-label").inner_text() == "100 %"
    view.locator("#stage").focus()
    box = view.locator("#stage").bounding_box()
    view.mouse.move(box["x"] + box["width"] / 2, box["y"] + 60)
    view.mouse.wheel(0, -1200)
    until(view, "parseInt(document.getElementById('zoom-label').textContent) > 300")
    before = view.evaluate(transforms)
    drag(view, 0.5, 0.45)
    after = view.evaluate(transforms)
    assert len(set(before)) == 1 == len(set(after))
    assert before != after
    view.click("#zoom-fit")
    assert len(set(view.evaluate(transforms))) == 1


@pytest.mark.parametrize("mode", ["split", "side"])
def test_one_to_one_is_pixel_for_pixel_in_any_window(opened, mode):
    view = opened(1401, 907)
    compare(view, "original", "gray", mode, "i3")
    view.click("#zoom-one")
    assert view.locator("#zoom-label").inner_text() == "100 %"
    pane = view.locator("#stage .pane").first
    shot = np.asarray(Image.open(io.BytesIO(pane.screenshot())).convert("RGB")).astype(int)
    where = view.evaluate("""() => { const layer = document.querySelector('#stage .layer').getBoundingClientRect();
        const pane = document.querySelector('#stage .pane').getBoundingClientRect();
        return [layer.left - Math.floor(pane.left), layer.top - Math.floor(pane.top)]; }""")
    left, top = (round(value) for value in where)
    # a part without the tags, left of the line
    part = (slice(60, 160), slice(20, 100))
    seen_part = shot[top + 60 : top + 160, left + 20 : left + 100]
    # the screen may round by one level
    assert np.abs(seen_part - picture(9, HEIGHT, WIDTH)[part]).max() <= 1


def test_a_double_click_zooms_to_its_place_in_the_pane_below_it(opened):
    view = opened()
    compare(view, "red", "gray", "side", "i3")
    last = view.locator("#stage .pane").nth(2).bounding_box()
    picked = view.evaluate("""() => { const box = document.querySelectorAll('#stage .layer')[2].getBoundingClientRect();
        return [box.left + 0.3 * box.width, box.top + 0.5 * box.height]; }""")
    assert last["x"] < picked[0] < last["x"] + last["width"]
    view.mouse.dblclick(*picked)
    until(view, "viewer.panes.scale !== null")
    box = view.evaluate("""() => { const box = document.querySelectorAll('#stage .layer')[2].getBoundingClientRect();
        return [box.left, box.top, box.width, box.height]; }""")
    assert (picked[0] - box[0]) / box[2] == pytest.approx(0.3, abs=0.02)
    assert (picked[1] - box[1]) / box[3] == pytest.approx(0.5, abs=0.02)


def test_what_is_under_the_pointer_stays_there_when_it_zooms(opened):
    view = opened()
    compare(view, "original", "gray", image="i3")
    view.locator("#stage").focus()
    box = view.locator("#stage").bounding_box()
    point = [box["x"] + 0.6 * box["width"], box["y"] + 0.4 * box["height"]]
    here = """([x, y]) => { const box = document.querySelector('#stage .layer').getBoundingClientRect();
        return [(x - box.left) / box.width, (y - box.top) / box.height]; }"""
    before = view.evaluate(here, point)
    view.mouse.move(*point)
    view.mouse.wheel(0, -800)
    until(view, "viewer.panes.scale !== null")
    assert view.evaluate(here, point) == pytest.approx(before, abs=4e-3)


def test_the_difference_is_that_of_the_pixels(opened):
    view = opened()
    compare(view, "original", "gray", "difference")
    # 103 against 100, times 8
    assert seen(view, 0.5) == (24, 24, 24)
    view.locator("#gain").fill("20")
    until(view, "document.querySelector('#stage .tag').textContent.endsWith('times 20')")
    assert seen(view, 0.5) == (60, 60, 60)
    compare(view, "original", "red", "difference")
    assert seen(view, 0.5) == (255, 255, 255)


def test_flicker_shows_both_in_turn_and_space_holds_it(opened):
    view = opened()
    compare(view, "red", "blue", "flicker")
    shown = "[...document.querySelectorAll('#stage .layer')].map(layer => layer.style.visibility).indexOf('visible')"
    first = view.evaluate(shown)
    until(view, f"{shown} !== {first}")
    until(view, f"{shown} === {first}")
    view.locator("#stage").focus()
    view.keyboard.press("Space")
    held = view.evaluate(shown)
    view.wait_for_timeout(1600)
    assert view.evaluate(shown) == held
    assert seen(view, 0.5) == (RED, BLUE)[held]
    view.keyboard.press("Space")
    assert view.evaluate(shown) != held


def test_keys_choose_image_codec_and_mode(opened):
    view = opened()
    view.select_option("#order", "name")
    compare(view, "original", "red")
    view.locator("#stage").focus()
    for key, expected in (
        ("ArrowRight", "i1 original red split"),
        ("ArrowDown", "i1 original blue split"),
        ("Shift+ArrowDown", "i1 red blue split"),
        ("x", "i1 blue red split"),
        ("d", "i1 blue red difference"),
        ("b", "i1 blue red side"),
        ("f", "i1 blue red flicker"),
        ("s", "i1 blue red split"),
        ("ArrowLeft", "i0 blue red split"),
    ):
        view.keyboard.press(key)
        view.wait_for_selector(f'#stage[data-ready="{expected}"]')
    # also after the line was moved, and from a button of the toolbar
    drag(view, 0.5, 0.6)
    for press, expected in (
        ("ArrowDown", "i0 blue blue split"),
        ("f", "i0 blue blue flicker"),
        ("s", "i0 blue blue split"),
    ):
        view.keyboard.press(press)
        view.wait_for_selector(f'#stage[data-ready="{expected}"]')
    view.click("#next")
    view.wait_for_selector('#stage[data-ready="i1 blue blue split"]')
    view.keyboard.press("ArrowLeft")
    view.keyboard.press("ArrowUp")
    view.wait_for_selector('#stage[data-ready="i0 blue red split"]')
    # and the address leads back to it
    assert view.locator("[data-mode=split]").get_attribute("aria-pressed") == "true"
    assert [view.locator(f"#{name}").input_value() for name in ("image", "left", "right")] == ["i0", "blue", "red"]
    again = opened(anchor="#" + view.evaluate("location.hash.slice(1)"))
    again.wait_for_selector('#stage[data-ready="i0 blue red split"]')
    assert seen(again, 0.4) == BLUE
    assert seen(again, 0.6) == RED


def test_the_worst_image_of_the_codec_comes_first(opened):
    view = opened()
    compare(view, "original", "gray", image="i2")
    names = "[...document.querySelectorAll('#strip button')].map(button => button.dataset.image)"
    # further from gray by 3, 23 and 5 levels; the last one without an error
    for order, expected in (("worst", ["i1", "i2", "i0", "i3"]), ("best", ["i3", "i0", "i2", "i1"])):
        view.select_option("#order", f"psnr_db {order}")
        view.wait_for_selector(f'#stage[data-ready="{expected[0]} original gray split"]')
        assert view.evaluate(names) == expected
        assert view.locator("#judged").inner_text() == "of gray"


def test_tables_sort_by_value_and_filter(opened):
    view = opened()
    number = [heading.strip() for heading in headings(view, "#image-table")].index("PSNR") + 1
    press = view.locator("#image-table thead button", has_text="PSNR").first.click
    press()
    numbers = [float(value.replace("∞", "inf")) for value in column(view, "#image-table", number)]
    assert numbers == sorted(numbers, reverse=True)
    assert len(set(numbers)) > 3
    assert numbers[:3] == [float("inf")] * 3
    press()
    assert [float(value.replace("∞", "inf")) for value in column(view, "#image-table", number)] == numbers[::-1]
    view.fill("#find", "i1")
    # it waits for the end of typing
    until(view, "document.querySelectorAll('#image-table tbody tr').length === 3")
    assert set(column(view, "#image-table", 1)) == {"i1"}
    view.locator("#row-models button", has_text="red").click()
    assert sorted(column(view, "#image-table", 2)) == ["blue", "gray"]
    assert view.locator("#row-count").inner_text() == "2 of 12 rows"
    view.locator("#image-table tbody tr", has_text="gray").click()
    view.wait_for_selector('#stage[data-ready="i1 original gray split"]')


def test_plots_show_what_is_chosen_and_save_as_svg(opened, tmp_path):
    view = opened()
    chart = "document.querySelectorAll('.chart')[0]"
    names = f"{chart}.data.map(trace => trace.name)"
    # an infinite PSNR has no place in a plot
    assert not {"red", "blue", "gray"} & set(view.evaluate(names))
    view.locator(".plot select").nth(1).select_option("ms_ssim")
    assert {"red", "blue", "gray", "MS-ILLM, kodak"} <= set(view.evaluate(names))
    view.locator("#chips button", has_text="red").click()
    view.locator("#chips button", has_text="MS-ILLM").click()
    assert not {"red", "MS-ILLM, kodak"} & set(view.evaluate(names))
    assert "MS-SSIM" in view.evaluate(f"{chart}.layout.yaxis.title.text")
    with view.expect_download() as saved:
        view.locator(".plot button", has_text="SVG").first.click()
    saved.value.save_as(tmp_path / "plot.svg")
    assert ET.parse(tmp_path / "plot.svg").getroot().tag.endswith("svg")
    # a figure on paper says which codec is which
    told = "".join(ET.parse(tmp_path / "plot.svg").getroot().itertext())
    assert "blue" in told
    assert "red" not in told


def test_a_tap_shows_the_other_picture_where_nothing_is_to_move(opened):
    view = opened(reduced_motion="reduce")
    compare(view, "red", "blue", "flicker")
    before = seen(view, 0.5)
    view.wait_for_timeout(900)
    assert seen(view, 0.5) == before
    view.locator("#stage").click()
    assert {before, seen(view, 0.5)} == {RED, BLUE}


def test_codecs_that_an_image_lacks_are_replaced(opened, tmp_path):
    evaluations.write(
        tmp_path / "a", {"i0": plain(GRAY), "i1": plain(RED)}, {"one": {"i0": plain(RED), "i1": plain(BLUE)}}
    )
    evaluations.write(tmp_path / "b", {"i0": plain(GRAY)}, {"two": {"i0": plain(BLUE)}})
    several = [content.read(tmp_path / name, name, f"{name}/") for name in ("a", "b")]
    page.write(tmp_path / "report.html", several, 10)
    view = opened(path=tmp_path / "report.html", anchor="#image=i1&right=b/two")
    view.wait_for_selector('#stage[data-ready="i1 original a/one split"]')
    compare(view, "a/one", "b/two")
    view.select_option("#order", "name")
    view.select_option("#image", "i1")
    view.wait_for_selector('#stage[data-ready="i1 a/one a/one split"]')
    assert view.locator("#right").input_value() == "a/one"
    # means over other images are no curve and no rival
    assert view.locator("#summary-table td.best").count() == 0


def test_several_rates_make_a_curve(opened, tmp_path):
    originals = {"i0": plain(GRAY)}
    for name, size in (("low", 100), ("high", 200)):
        evaluations.write(tmp_path / name, originals, {"mine": {"i0": plain((size, 100, 100))}}, size)
    several = [content.read(tmp_path / name, name, f"{name}/") for name in ("low", "high")]
    page.write(tmp_path / "report.html", several, 10)
    view = opened(path=tmp_path / "report.html")
    trace = view.evaluate("document.querySelectorAll('.chart')[0].data.find(trace => trace.name === 'mine')")
    assert trace["mode"] == "lines+markers"
    assert len(trace["x"]) == 2
    assert trace["x"] == sorted(trace["x"])
    assert view.locator("#left option").all_inner_texts() == ["original", "low/mine", "high/mine"]
