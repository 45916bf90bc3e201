"""Staged, distributed training of the MS-ILLM perceptual image codec, and the codec itself."""

__version__ = "0.1.0"
