"""Processes: what stops them, what ends with them, and how work is divided among them.

Owns: stop signals and their handlers, child processes, a pool of threads, processes or Ray tasks, a Ray session.
May import: nothing of ours. Only `pool` and `ray_session` import ray.
"""
