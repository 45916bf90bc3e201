"""Before it measures anything, an evaluation measures what it knows: an image against itself, and one JPEG of it."""

import io
import math
from collections.abc import Mapping

import numpy as np
from PIL import Image

from pipeline.data.images import Pixels
from pipeline.errors import MetricError
from pipeline.evaluation.frechet import Features, FeatureSet
from pipeline.evaluation.instruments import Instruments, set_distances
from pipeline.evaluation.metric_table import METRICS

SIDE, JPEG_QUALITY = 256, 10
# Of an image against itself; VMAF of equal frames depends on the frame
OF_ITSELF = {
    "psnr_db": (math.inf, 0.0),
    "ms_ssim": (1.0, 1e-6),
    "lpips": (0.0, 1e-6),
    "dists": (0.0, 1e-5),
    "ssimulacra2": (100.0, 1e-6),
    "vmaf": (97.43, 0.5),
    "fid": (0.0, 1e-3),
    "fid_64": (0.0, 1e-3),
    "kid": (0.0, 1e-3),
    "vgg_fd_64": (0.0, 1e-3),
}
# Of the JPEG: value, and how far libraries' versions may move it
OF_JPEG = {
    "psnr_db": (25.685, 0.05),
    "ms_ssim": (0.7304, 0.001),
    "lpips": (0.3567, 0.002),
    "dists": (0.2900, 0.001),
    "ssimulacra2": (-33.69, 0.3),
    "vmaf": (47.8, 1.0),
    "vgg_fd_64": (47.66, 0.7),
}


def picture() -> Pixels:
    """A picture with gradients, edges and texture, (256, 256, 3) uint8: the same on every machine."""
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    noise = np.random.Generator(np.random.PCG64(2023)).integers(0, 64, (SIDE, SIDE), dtype=np.int64)
    stripes = 60 * ((x // 8 + y // 8) % 2) * (x < SIDE // 2)
    disc = 90 * ((x - 176) ** 2 + (y - 90) ** 2 < 60**2)
    planes = [x // 2 + stripes, y // 2 + disc + noise * (y > SIDE // 2), (x + y) // 4 + noise // 2]
    return np.stack(planes, axis=-1).clip(0, 255).astype(np.uint8)


def check(instruments: Instruments) -> None:
    """Raises: MetricError naming every metric that is not what it must be."""
    original = picture()
    stream = io.BytesIO()
    Image.fromarray(original).save(stream, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
    with Image.open(stream) as image:
        coded = np.array(image.convert("RGB"))
    problems = []
    for what, pixels, expected in (("itself", original, OF_ITSELF), (f"its JPEG {JPEG_QUALITY}", coded, OF_JPEG)):
        for name, value in measured(instruments, pixels, original).items():
            if name in expected and not _is_near(value, *expected[name]):
                problems.append(f"{METRICS[name].name} against {what} is {value:.5g}, expected {expected[name][0]:.5g}")
    if problems:
        raise MetricError(
            f"a test picture has other values here, so nothing was measured: {'; '.join(problems)}. A library computes something "
            "else than the one these values were made with; compare its version with requirements/pins.txt"
        )


def measured(instruments: Instruments, ours: Pixels, original: Pixels) -> dict[str, float]:
    """Every metric that the instruments have, the distances of sets too."""
    reference = instruments.original(original)
    pair = {name: value for name, value in instruments.of_pair(ours, reference).items() if value is not None}
    features, originals = instruments.features_of(ours), reference.patch_features
    return pair | set_distances(_sets(features), _sets(originals), at_least=1)


def _sets(features: Mapping[str, Features]) -> dict[str, FeatureSet]:
    return {kind: FeatureSet(found) for kind, found in features.items()}


def _is_near(value: float, expected: float, tolerance: float) -> bool:
    return value == expected or abs(value - expected) <= tolerance
