"""What one stage hands to the next, and the run folder that it comes from.

Owns: the manifest and its digest, publishing and verifying a folder, one config and one writer per run folder.
May import: storage, config, errors, log, text. Knows nothing of the registry: `registry.resolve` finds what a name stands for.
"""
