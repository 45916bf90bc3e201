"""`illm compress` and `illm decompress` on real files: what they make, and that nothing of the user's is lost."""

import os
import pty
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.artifacts.artifact import publish
from pipeline.artifacts.manifest import Manifest
from pipeline.models import serialization
from pipeline.storage import outputs
from tests.conftest import ROOT, Finished, assert_one_clear_line, illm_here, picture
from tests.models.test_networks import SMALL, small_codec


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a very small codec."""
    run = tmp_path_factory.mktemp("codec")
    publish(run / "artifact", Manifest(kind="codec"), lambda scratch: serialization.save(scratch, small_codec(), SMALL))
    return run


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A folder with two photos."""
    for seed, name in enumerate(("a.png", "b.png")):
        Image.fromarray(picture(seed)).save(tmp_path / name)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_refused(folder: Path, *words: object, told: str) -> None:
    """The command changes nothing and says why in one line."""
    before = contents(folder)
    ended = illm_here(*words, "--codec", "no-codec", cwd=folder)
    assert_one_clear_line(ended, told)
    assert len(ended.err.splitlines()) == 1
    assert contents(folder) == before


def test_default_names_never_touch_the_original_or_what_is_there(there, codec):
    photo = (there / "a.png").read_bytes()
    ended = illm_here("compress", "a.png", "--codec", codec, cwd=there)
    assert ended.code == 0, ended.err
    assert ended.out.startswith("a.illm: 128x96, ")
    ended = illm_here("decompress", "a.illm", "--codec", codec, cwd=there)
    assert ended.out == "a.restored.png: 128x96\n"
    assert (there / "a.png").read_bytes() == photo
    assert_refused(there, "compress", "a.png", told="a.illm: exists already; --force")
    assert_refused(there, "decompress", "a.illm", told="a.restored.png: exists already; --force")
    assert_refused(there, "decompress", "a.illm", "a.png", told="a.png: exists already; --force")
    (there / "a.illm").write_bytes(b"old")
    assert illm_here("compress", "a.png", "--force", "--codec", codec, cwd=there).code == 0
    assert (there / "a.illm").read_bytes().startswith(b"ILL\x02")


def test_two_photos_of_a_shells_glob_are_both_compressed_and_both_kept(there, codec):
    before = contents(there)
    ended = illm_here("compress", *sorted(there.glob("*.png")), "--codec", codec, cwd=there)
    assert ended.code == 0, ended.err
    assert contents(there).keys() == {"a.png", "b.png", "a.illm", "b.illm"}
    assert contents(there).items() >= before.items()


@pytest.mark.parametrize("name", ["b.png", "new.jpg", "b.PNG"])
def test_an_image_is_no_name_for_a_compressed_file(there, name):
    assert_refused(there, "compress", "a.png", "-o", name, "--force", told=f"{name}: this names an image")


@pytest.mark.parametrize("name", ["photo.illm", "sub/../photo.illm", "link.illm", "hard.illm"])
def test_an_input_is_never_overwritten_under_any_of_its_names(there, name):
    (there / "sub").mkdir()
    (there / "a.png").rename(there / "photo.illm")
    (there / "link.illm").symlink_to("photo.illm")
    (there / "hard.illm").hardlink_to(there / "photo.illm")
    assert_refused(there, "compress", "photo.illm", name, "--force", told=f"{name}: is an input")
    assert_refused(there, "compress", "photo.illm", "b.png", "--force", told="photo.illm: is an input")


def test_a_batch_goes_on_after_a_bad_image_and_ends_with_code_2(there, codec):
    (there / "0.png").write_bytes(b"no image")
    ended = illm_here("compress", "0.png", "a.png", "b.png", "-o", "new/small", "--codec", codec, cwd=there)
    assert_one_clear_line(ended, "illm: 0.png: not a readable image", "1 of 3 files failed")
    assert len(ended.err.splitlines()) == 2
    assert [line.split(":")[0] for line in ended.out.splitlines()] == ["new/small/a.illm", "new/small/b.illm"]
    (there / "new/small/a.illm").write_bytes(b"ILLM, but damaged")
    ended = illm_here("decompress", "new/small", "-o", "back", "--codec", codec, cwd=there)
    assert_one_clear_line(ended, "illm: new/small/a.illm: ", "1 of 2 files failed")
    assert os.listdir(there / "back") == ["b.restored.png"]


def test_a_folder_is_converted_with_its_subfolders_and_without_what_is_hidden(there, codec):
    for place in ("photos/deep/x.JPG", "photos/y.png", "photos/.hidden/z.png", "photos/.z.png"):
        (there / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(1)).save(there / place)
    (there / "photos/notes.txt").write_text("no image")
    ended = illm_here("compress", "photos", "-o", "small", "--codec", codec, cwd=there)
    assert ended.code == 0, ended.err
    assert contents(there / "small").keys() == {"deep/x.illm", "y.illm"}
    assert_refused(
        there,
        "compress",
        "photos",
        "-o",
        "small",
        told="exists already; --force replaces it, or name another output (and 1",
    )
    assert_refused(there, "decompress", "photos", told="photos: holds no file that ends with .illm")


def test_names_that_do_not_fit_are_told_before_anything_is_written(there):
    Image.fromarray(picture(1)).save(there / "a.jpg")
    (there / "folder").mkdir()
    assert_refused(there, "compress", "a.png", "a.jpg", told="a.png and a.jpg would both become a.illm")
    assert_refused(there, "compress", "a.png", "no.png", told="no.png: no such file; an output is named with -o")
    assert_refused(there, "compress", "a.png", "folder", told="folder: is a folder; name it alone, or with -o")
    assert_refused(there, "compress", "a.png", "b.png", "-o", "x.illm", told="x.illm: 2 file(s) do not go into one")
    assert_refused(there, "compress", "a.png", "-", "b.png", told="standard input cannot be one of several")
    assert_refused(
        there, "decompress", "a.png", "-o", "folder/x", told="no image format that can be written is called ''"
    )
    assert_refused(there, "decompress", "a.png", "x.psd", told="no image format that can be written is called '.psd'")


def test_what_is_not_there_or_not_compressed_is_told_with_its_name_once(there):
    for words in (("compress", "nope"), ("decompress", "nope"), ("inspect", "nope")):
        assert illm_here(*words, cwd=there).err.startswith("illm: nope: no such file")
    assert_refused(there, "decompress", "a.png", told="illm: a.png: not a compressed image")


def test_places_are_checked_before_torch_is_imported(there):
    (there / "loop.illm").symlink_to("loop.illm")
    (there / "folder.illm").mkdir()
    words = [
        ["compress", "a.png", "/proc/x.illm"],
        ["compress", "a.png", f"{'x' * 300}.illm"],
        ["compress", "a.png", f"new/{'x' * 300}/y.illm"],
        ["compress", "a.png", "loop.illm"],
        ["compress", "a.png", "folder.illm"],
        ["compress", "a.png", "b.png/x.illm"],
        ["decompress", "a.png", "x.xyz"],
        ["decompress", "a.png", "b.png"],
    ]
    code = f"""if True:
        import sys
        from pipeline.cli import app
        for words in {words}:
            sys.argv = ["illm", *words]
            print(app.exit_code(app.app))
        print("torch" in sys.modules)
    """
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=there,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.stdout.split() == ["2"] * len(words) + ["False"], ended.stderr
    told = ended.stderr.splitlines()
    reasons = ("No such", "too long", "too long", "levels of", "is a folder", "Not a dir", "no image format", "exists")
    for line, output, reason in zip(told, [output for *_, output in words], reasons, strict=True):
        assert output in line
        assert reason in line
        assert ".tmp" not in line


def test_a_name_of_any_length_that_the_disk_takes_is_written(there, codec):
    name = f"{'x' * 250}.illm"
    assert illm_here("compress", "a.png", name, "--codec", codec, cwd=there).code == 0
    assert sorted(os.listdir(there)) == ["a.png", "b.png", name]


def test_a_pipe_is_written_into_and_stays_a_pipe(there, codec):
    os.mkfifo(there / "pipe")
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append((there / "pipe").read_bytes()), daemon=True)
    reader.start()
    ended = illm_here("compress", "a.png", "pipe", "--codec", codec, cwd=there)
    assert ended.code == 0, ended.err
    assert stat.S_ISFIFO((there / "pipe").stat().st_mode)
    reader.join()
    assert received[0].startswith(b"ILL\x02")


def test_a_link_leads_to_what_is_written_and_stays_a_link(there, codec):
    (there / "link.illm").symlink_to("deep/target.illm")
    assert illm_here("compress", "a.png", "link.illm", "--codec", codec, cwd=there).code == 0
    assert (there / "link.illm").is_symlink()
    assert (there / "deep/target.illm").read_bytes().startswith(b"ILL\x02")
    (there / "deep/target.illm").write_bytes(b"old")
    assert_refused(there, "compress", "a.png", "link.illm", told="link.illm: exists already")
    assert illm_here("compress", "a.png", "link.illm", "--force", "--codec", codec, cwd=there).code == 0
    assert (there / "link.illm").is_symlink()
    assert (there / "deep/target.illm").read_bytes().startswith(b"ILL\x02")
    assert os.listdir(there / "deep") == ["target.illm"]


@pytest.fixture
def devices(there: Path) -> Path:
    """Devices like /dev/null and /dev/full of the test's own: what replaces them must not take away the machine's."""
    try:
        for name, minor in (("null", 3), ("full", 7)):
            os.mknod(there / name, stat.S_IFCHR | 0o666, os.makedev(1, minor))
            os.close(os.open(there / name, os.O_WRONLY))
    except PermissionError:
        pytest.skip("making a device needs root, and a file system that has them")
    return there


def test_devices_are_written_into_and_a_full_one_is_told(devices, codec):
    ended = illm_here("compress", "a.png", "null", "--codec", codec, cwd=devices)
    assert ended.code == 0, ended.err
    ended = illm_here("compress", "a.png", "full", "--codec", codec, cwd=devices)
    assert_one_clear_line(ended, "cannot write full: No space left on device; free some space")
    for name in ("null", "full"):
        assert stat.S_ISCHR((devices / name).stat().st_mode)


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1"])
def test_standard_output_has_several_names(name):
    assert outputs.named(name) is None


def test_a_full_disk_is_told_by_the_outputs_name(there, codec, small_disk):
    (small_disk / "fill").write_bytes(bytes(90_000))
    noise = np.random.default_rng(0).integers(0, 256, (640, 640, 3), dtype=np.uint8)
    Image.fromarray(noise).save(there / "noise.png")
    assert illm_here("compress", "noise.png", "--codec", codec, cwd=there).code == 0
    output = small_disk / "noise.png"
    ended = illm_here("decompress", "noise.illm", output, "--codec", codec, cwd=there)
    assert_one_clear_line(ended, f"cannot write {output}: No space left on device; free some space")
    assert not output.exists()


def shell(line: str, cwd: Path) -> Finished:
    """Runs a line of bash in which `illm` is our command; output that is no text is shown as it is."""
    define = f'set -o pipefail; illm() {{ "{sys.executable}" -m pipeline "$@"; }}; '
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    ended = subprocess.run(["bash", "-c", define + line], cwd=cwd, env=env, capture_output=True, check=False)
    return Finished(ended.returncode, ended.stdout.decode("latin-1"), ended.stderr.decode())


def test_standard_streams_carry_the_data_and_nothing_else(there, codec):
    ended = shell(f"illm compress - --codec {codec} < a.png | illm decompress - --codec {codec} | cat > c.png", there)
    assert ended.code == 0, ended.err
    assert ended.out == ""
    assert ended.err.splitlines()[-1] == "standard input: 128x96"
    assert illm_here("compress", "a.png", "--codec", codec, cwd=there).code == 0
    assert illm_here("decompress", "a.illm", "a.bmp", "--codec", codec, cwd=there).code == 0
    assert np.array_equal(Image.open(there / "c.png"), Image.open(there / "a.bmp"))
    assert sorted(os.listdir(there)) == ["a.bmp", "a.illm", "a.png", "b.png", "c.png"]


def test_a_reader_that_has_enough_is_no_error(there, codec):
    reader, output = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "pipeline", "compress", "a.png", "-", "--codec", str(codec)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    ended = subprocess.run(command, cwd=there, env=env, stdout=output, stderr=subprocess.PIPE, text=True, check=False)
    os.close(output)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_binary_data_is_not_sent_to_a_terminal(there):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "pipeline", "compress", "a.png", "-o", "-"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=there, env=env, stdout=theirs, stderr=subprocess.PIPE, text=True, check=False)
    os.close(theirs)
    os.close(ours)
    assert_one_clear_line(Finished(ended.returncode, "", ended.stderr), "binary data does not go to a terminal")


def test_what_is_lost_of_an_image_is_said_beside_the_output(there, codec):
    Image.fromarray(np.dstack([picture(0), np.zeros((96, 128), np.uint8)])).save(there / "clear.png")
    frames = [Image.fromarray(picture(seed)) for seed in range(2)]
    frames[0].save(there / "moves.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)).save(there / "deep.png")
    ended = illm_here("compress", "clear.png", "moves.gif", "deep.png", "--codec", codec, cwd=there)
    assert ended.code == 0
    assert "warning: deep.png has more than 8 bits per channel; they were rounded to 8" in ended.err
    assert "warning: moves.gif is animated; its first frame was taken" in ended.err
    assert "warning" not in ended.out


def test_transparency_is_kept_where_the_output_can_have_it(there, codec):
    opacity = np.linspace(0, 255, 96 * 128).astype(np.uint8).reshape(96, 128)
    Image.fromarray(np.dstack([picture(0), opacity])).save(there / "clear.png")
    assert illm_here("compress", "clear.png", "--codec", codec, cwd=there).code == 0
    for name in ("back.png", "back.webp", "back.tif", "back.bmp"):
        ended = illm_here("decompress", "clear.illm", name, "--codec", codec, cwd=there)
        assert ended.code == 0
        with Image.open(there / name) as image:
            assert (image.mode == "RGBA") == (name != "back.bmp")
            if name in ("back.png", "back.tif"):
                assert np.array_equal(np.asarray(image)[..., 3], opacity)
        assert ("BMP has none, so it was laid over white" in ended.err) == (name == "back.bmp")
    # where nothing can be seen, white: as if it lay over white
    with Image.open(there / "back.png") as kept, Image.open(there / "back.bmp") as flat:
        colors = np.asarray(kept).astype(float)
        over_white = colors[..., :3] * (colors[..., 3:] / 255) + 255 - colors[..., 3:]
        assert np.abs(over_white - np.asarray(flat)).max() <= 1


def test_opaque_alpha_is_not_stored(there, codec):
    Image.fromarray(np.dstack([picture(0), np.full((96, 128), 255, np.uint8)])).save(there / "opaque.png")
    Image.fromarray(picture(0)).save(there / "plain.png")
    for name in ("opaque", "plain"):
        assert illm_here("compress", f"{name}.png", "--codec", codec, cwd=there).code == 0
    assert (there / "opaque.illm").read_bytes() == (there / "plain.illm").read_bytes()


def test_an_image_that_is_too_large_for_its_format_is_told(there, codec):
    Image.fromarray(picture(0, 1, 16400)).save(there / "long.png")
    assert illm_here("compress", "long.png", "--codec", codec, cwd=there).code == 0
    ended = illm_here("decompress", "long.illm", "long.webp", "--codec", codec, cwd=there)
    assert_one_clear_line(ended, "long.illm: 16400x1 pixels cannot be written as WEBP")
    assert not (there / "long.webp").exists()
