"""What evaluation measures: the one place that knows a metric's label, digits and direction, and how it is made."""

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Metric:
    """name: for tables. label: for axes and headings. per_image: it has a value for each image, and its total is their mean;
    otherwise it is of a whole set of images. how: it is made, for readers of a report. weights: of which network it needs, as
    `pretrained.FILES` names it.
    """

    name: str
    digits: int
    higher_is_better: bool
    per_image: bool
    how: str
    unit: str = ""
    weights: str = ""

    @property
    def label(self) -> str:
        if self.name == "bpp":
            return "bits per pixel"
        unit = f" in {self.unit}" if self.unit else ""
        return f"{self.name}{unit} ({'higher' if self.higher_is_better else 'lower'} is better)"


# In the order in which tables and pages show them
METRICS = {
    "bpp": Metric(
        "bpp",
        4,
        higher_is_better=False,
        per_image=True,
        how="8 times all bytes of the file, header included, per pixel.",
    ),
    "psnr_db": Metric(
        "PSNR",
        2,
        higher_is_better=True,
        per_image=True,
        unit="dB",
        how="Of the 8-bit RGB image, peak 255; the mean over images is of their values in dB.",
    ),
    "ms_ssim": Metric(
        "MS-SSIM",
        4,
        higher_is_better=True,
        per_image=True,
        how="Multi-scale SSIM (Wang et al. 2003) as in the MS-ILLM release: valid windows, per channel, range 255; images of "
        "176 pixels or more.",
    ),
    "lpips": Metric(
        "LPIPS",
        4,
        higher_is_better=False,
        per_image=True,
        weights="alexnet",
        how="Zhang et al. 2018, AlexNet, version 0.1, of the 8-bit image at full size.",
    ),
    "dists": Metric(
        "DISTS",
        4,
        higher_is_better=False,
        per_image=True,
        weights="vgg16",
        how="Ding et al. 2020, of the 8-bit image at full size.",
    ),
    "ssimulacra2": Metric(
        "SSIMULACRA 2",
        2,
        higher_is_better=True,
        per_image=True,
        how="Sneyers 2023, by the package ssimulacra2; 100 for equal images; images of 256 pixels or more.",
    ),
    "vmaf": Metric(
        "VMAF",
        2,
        higher_is_better=True,
        per_image=True,
        how="Netflix's VMAF 0.6.1 of one frame, on luma (BT.709), by ffmpeg's libvmaf.",
    ),
    "fid": Metric(
        "FID/256",
        2,
        higher_is_better=False,
        per_image=False,
        weights="inception",
        how="Frechet distance (Heusel et al. 2017) of Inception features of 256x256 patches, with a second grid from "
        "(128, 128); against the same originals' patches; from 2048 patches on.",
    ),
    "fid_64": Metric(
        "FID/64",
        2,
        higher_is_better=False,
        per_image=False,
        weights="inception",
        how="The same of a plain grid of 64x64 patches.",
    ),
    "kid": Metric(
        "KID/256",
        5,
        higher_is_better=False,
        per_image=False,
        weights="inception",
        how="Kernel distance (Binkowski et al. 2018) of the features of FID/256; from 1000 patches on.",
    ),
    "vgg_fd_64": Metric(
        "VGG-FD/64",
        2,
        higher_is_better=False,
        per_image=False,
        weights="vgg16",
        how="Frechet distance of VGG16's features (last ReLU, mean over positions) of 64x64 patches; not FID, and not to be "
        "compared with it; from 512 patches on.",
    ),
}
PER_IMAGE = tuple(name for name, metric in METRICS.items() if metric.per_image)
OF_SETS = tuple(name for name in METRICS if name not in PER_IMAGE)
TIMES = ("encode_seconds_per_megapixel", "decode_seconds_per_megapixel")
# What stands for realism, the first that was measured; MS-SSIM and PSNR where no weights are
REALISM = ("fid", "fid_64", "vgg_fd_64", "kid", "dists", "lpips", "ms_ssim", "psnr_db")


def sign(name: str) -> int:
    """1 for metrics of which more is better, else -1."""
    return 1 if name in METRICS and METRICS[name].higher_is_better else -1


def format_value(name: str, value: float | None) -> str:
    """A value with the digits that its metric deserves."""
    return "-" if value is None else f"{value:.{METRICS[name].digits}f}"


def print_table(totals: Mapping[str, Mapping[str, float | None]], num_images: int) -> None:
    """The mean of every metric that was measured, one row per model."""
    names = [name for name in METRICS if any(row[name] is not None for row in totals.values())]
    table = Table(title=f"mean over {num_images} held-out image(s)")
    table.add_column("model")
    for name in names:
        table.add_column(name, justify="right")
    for model, row in totals.items():
        table.add_row(model, *(format_value(name, row[name]) for name in names))
    Console(width=100).print(table)
