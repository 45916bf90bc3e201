"""When to train, on what, and how to resume after an interruption.

Owns: the loop, engines, ranks and collectives, devices, optimizers, checkpoints, the launcher.
May import: data, models, processes, storage, config. The only package that imports accelerate and deepspeed.
"""
