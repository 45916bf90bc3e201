"""What evaluation measures: the one place that knows a metric's label, digits and direction."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """name: for tables. label: for axes and headings. per_image: it has a value for each image, and its total is their mean;
    otherwise it is of a whole set of images. weights: of which network it needs, as `pretrained.FILES` names it.
    """

    name: str
    digits: int
    higher_is_better: bool
    per_image: bool
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
    "bpp": Metric("bpp", 4, higher_is_better=False, per_image=True),
    "psnr_db": Metric("PSNR", 2, higher_is_better=True, per_image=True, unit="dB"),
    "ms_ssim": Metric("MS-SSIM", 4, higher_is_better=True, per_image=True),
    "lpips": Metric("LPIPS", 4, higher_is_better=False, per_image=True, weights="alexnet"),
    "dists": Metric("DISTS", 4, higher_is_better=False, per_image=True, weights="vgg16"),
    "ssimulacra2": Metric("SSIMULACRA 2", 2, higher_is_better=True, per_image=True),
    "vmaf": Metric("VMAF", 2, higher_is_better=True, per_image=True),
    "fid": Metric("FID/256", 2, higher_is_better=False, per_image=False, weights="inception"),
    "fid_64": Metric("FID/64", 2, higher_is_better=False, per_image=False, weights="inception"),
    "kid": Metric("KID/256", 5, higher_is_better=False, per_image=False, weights="inception"),
    "vgg_fd_64": Metric("VGG-FD/64", 2, higher_is_better=False, per_image=False, weights="vgg16"),
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
