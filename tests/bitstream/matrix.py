"""The same files, written once, decoded in every way that this machine has: docs/bitstream.md has the table.

python -m tests.bitstream.matrix FOLDER            writes files of many photos there, decodes them in every way, prints rows
python -m tests.bitstream.matrix FOLDER WAY...     only these

A way fails if a file does not decode to the symbols that its encoder meant. What decodes here needs torch and numpy alone, so
that it runs on other processors, too: the integers of the codec, and the coder.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.bitstream import container
from pipeline.bitstream.symbols import SymbolCoder
from pipeline.errors import BitstreamError
from pipeline.models import exact_scales
from pipeline.models.exact_scales import ExactScales, Layer
from pipeline.models.tables import Tables

# Environment, and options of `decode`
WAYS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "here": ({}, ()),
    "1 thread": ({"OMP_NUM_THREADS": "1"}, ()),
    "2 threads": ({"OMP_NUM_THREADS": "2"}, ()),
    **{f"torch: {c}": ({"ATEN_CPU_CAPABILITY": c}, ()) for c in ("default", "avx2", "avx512")},
    **{
        f"oneDNN: {isa}": ({"DNNL_MAX_CPU_ISA": isa}, ())
        for isa in ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_BF16", "AVX512_CORE_AMX")
    },
    **{f"MKL: {isa}": ({"MKL_ENABLE_INSTRUCTIONS": isa}, ()) for isa in ("SSE4_2", "AVX2", "AVX512")},
    "oneDNN off": ({}, ("no_onednn",)),
    "channels last": ({}, ("channels_last",)),
    "strips of 1 row": ({}, ("strips",)),
    "products of matrices": ({}, ("products",)),
    "int64": ({}, ("int64",)),
    "coder in plain Python": ({}, ("plain",)),
    "GPU": ({}, ("gpu",)),
    "GPU, products of matrices": ({}, ("gpu", "products")),
    # the check of the check: these must fail
    "one bit of one weight lost": ({}, ("lost_bit",)),
    "scales in float32": ({}, ("float32",)),
}
MUST_FAIL = ("one bit of one weight lost", "scales in float32")


def by_products(layer: Layer, x: Tensor, is_transposed: bool) -> Tensor:
    """`exact_scales.accumulated` with the sums in another order."""
    weight, padding = layer.weight.to(x.dtype), 1
    if is_transposed:
        spread = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
        spread[..., ::2, ::2] = x
        x, weight, padding = spread, weight.transpose(0, 1).flip(2, 3), 2
    columns = F.unfold(x, weight.shape[-1], padding=padding)
    sums = (weight.flatten(1) @ columns).reshape(x.shape[0], len(weight), *x.shape[2:])
    return sums + layer.bias.to(x.dtype).reshape(1, -1, 1, 1)


def decode(folder: Path, options: tuple[str, ...]) -> dict[str, object]:
    """How many files of each codec do not decode to what was encoded, with the seconds that took."""
    found: dict[str, object] = {}
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        given = torch.load(place / "integers.pt")
        state = given["scales"]
        if "lost_bit" in options:
            state["0.weight"].view(-1)[state["0.weight"].abs().argmax()] ^= 64
        if "gpu" in options:
            state = {name: value.cuda() for name, value in state.items()}
        exact = ExactScales.from_state(state)
        coder = SymbolCoder(Tables(**given["z"]), Tables(**given["y"]), plain="plain" in options)
        meant, wrong, started = json.loads((place / "digests.json").read_text()), 0, time.perf_counter()
        for name, digest in meant.items():
            packet = container.unpack((place / name).read_bytes())
            rows, columns = (-(-side // 16) for side in (packet.height, packet.width))
            z_shape = (1, len(given["z"]["rows"]), -(-packet.height // 64), -(-packet.width // 64))
            indexes = indexes_of(exact, options, rows, columns)
            try:
                wrong += coder.decode(packet.streams[0], z_shape, indexes).digest() != digest
            except BitstreamError:
                wrong += 1
        found[place.name] = {"files": len(meant), "wrong": wrong, "s": round(time.perf_counter() - started, 1)}
    return found


def indexes_of(exact: ExactScales, options: tuple[str, ...], rows: int, columns: int) -> Callable[[Tensor], Tensor]:
    def indexes(z: Tensor) -> Tensor:
        if "channels_last" in options:
            z = z.contiguous(memory_format=torch.channels_last)
        dtype = {"int64": torch.int64, "float32": torch.float32}.get(next(iter({"int64", "float32"} & {*options}), ""))
        kept = exact_scales.accumulated, exact_scales.STRIP_POSITIONS, torch.backends.mkldnn.enabled
        torch.backends.mkldnn.enabled = "no_onednn" not in options
        if "products" in options:
            exact_scales.accumulated = by_products
        if "strips" in options:
            exact_scales.STRIP_POSITIONS = 1
        try:
            found = exact.indexes(z.to(exact.medians.device), dtype or torch.float64)
        finally:
            exact_scales.accumulated, exact_scales.STRIP_POSITIONS, torch.backends.mkldnn.enabled = kept
        return found[..., :rows, :columns].cpu().contiguous()

    return indexes


def write(folder: Path, count: int = 104, side: int = 512) -> None:
    """Files of photos by two codecs: one of the demo's widths, and one with the published hyperprior."""
    from pipeline.bitstream.codec import ImageCodec
    from pipeline.models.codec import CodecConfig
    from pipeline.models.tables import checked_tables
    from tests.bitstream.test_round_trip import DEMO, trained_like
    from tests.support.photos import crops

    wide = CodecConfig(channels=(8, 16, 24, 32, 48), num_residual_blocks=1)
    for name, cfg in (("demo", DEMO), ("published hyperprior", wide)):
        photos = crops(count, side)
        codec = trained_like(cfg, photos[0])
        image_codec, place, digests = ImageCodec(codec), folder / name, {}
        place.mkdir(parents=True)
        z, y = (vars(tables) for tables in checked_tables(codec))
        torch.save({"scales": codec.exact_scales.state_dict(), "z": z, "y": y}, place / "integers.pt")
        for number, pixels in enumerate(photos):
            content, symbols = image_codec.encode(pixels)
            (place / f"{number}.illm").write_bytes(content)
            digests[f"{number}.illm"] = symbols.digest()
        (place / "digests.json").write_text(json.dumps(digests))


def main(folder: Path, ways: list[str]) -> None:
    if ways[:1] == ["--in-this-process"]:
        options = WAYS[ways[1]][1]
        no_gpu = "gpu" in options and not torch.cuda.is_available()
        print(
            json.dumps({"way": ways[1], **({"not here": "no GPU"} if no_gpu else decode(folder, options))}), flush=True
        )
        return
    if not folder.exists():
        write(folder)
    for way in ways or WAYS:
        command = [sys.executable, "-m", "tests.bitstream.matrix", str(folder), "--in-this-process", way]
        subprocess.run(command, env=os.environ | WAYS[way][0], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
