"""A search over settings: a stage that runs stages.

Owns: the search space, trials, Ray Tune, results. May import: stages and all below.
"""
