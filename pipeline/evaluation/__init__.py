"""What a codec is worth: measured on real files, compared with intervals.

Owns: metrics of images and of sets, conventional codecs, held-out images, comparisons with intervals.
May import: bitstream, models, data, sharding, registry, artifacts.
"""
