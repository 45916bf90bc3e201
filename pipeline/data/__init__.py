"""Shards become batches: the same sample at the same position, whatever reads it.

Owns: the format of shards, decoding, the order of samples, crops, the loader and its memory.
May import: artifacts, storage, config. Knows nothing of networks.
"""
