"""Names and registered versions.

Owns: what `runs/x`, a URL or models:/NAME@ALIAS stands for; versions, aliases and their log, lineage, pruning.
May import: tracking, data (the format of shards), artifacts, storage, config. Knows nothing of networks or metrics.
"""
