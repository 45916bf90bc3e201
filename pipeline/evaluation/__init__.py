"""What a codec is worth: measured on real files, compared with intervals, reported.

Owns: metrics of images and of sets, conventional codecs, held-out images, comparisons with intervals, the report.
May import: bitstream, models, data, sharding, registry, artifacts.
"""
