"""What a codec is worth: measured on real files, compared with intervals, reported.

Owns: metrics, FID and KID, anchors, held-out images, comparisons, the report.
May import: bitstream, models, data, sharding, registry, artifacts.
"""
