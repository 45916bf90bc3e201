"""What evaluation measures: the one place that knows a metric's label, digits and direction."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """label: for axes and headings. per_image: it has a value for each image, and its total is their mean; otherwise it is of
    a whole set of images.
    """

    label: str
    digits: int
    higher_is_better: bool
    per_image: bool


# In the order in which tables and pages show them
METRICS = {
    "bpp": Metric("bits per pixel", 4, higher_is_better=False, per_image=True),
    "psnr_db": Metric("PSNR in dB (higher is better)", 2, higher_is_better=True, per_image=True),
    "ms_ssim": Metric("MS-SSIM (higher is better)", 4, higher_is_better=True, per_image=True),
    "lpips": Metric("LPIPS (lower is better)", 4, higher_is_better=False, per_image=True),
    "fid": Metric("FID/256 (lower is better)", 2, higher_is_better=False, per_image=False),
    "kid": Metric("KID/256 (lower is better)", 5, higher_is_better=False, per_image=False),
}
PER_IMAGE = tuple(name for name, metric in METRICS.items() if metric.per_image)
TIMES = ("encode_seconds_per_megapixel", "decode_seconds_per_megapixel")


def sign(name: str) -> int:
    """1 for metrics of which more is better, else -1."""
    return 1 if name in METRICS and METRICS[name].higher_is_better else -1


def format_value(name: str, value: float | None) -> str:
    """A value with the digits that its metric deserves."""
    return "-" if value is None else f"{value:.{METRICS[name].digits}f}"
