"""The networks, their losses that are networks, and how they are saved.

Owns: codec, labeler, discriminators, layers, entropy models and their tables, LPIPS, weights of others, the authors' checkpoints.
May import: artifacts, storage, config, losses. Only `entropy` imports compressai.
"""
