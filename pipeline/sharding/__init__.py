"""Images from anywhere become shards.

Owns: sources, archives, known data sets, filters, duplicates, the plan of shards, writing them, the data card.
May import: data (the format of shards), processes, storage, config.
"""
