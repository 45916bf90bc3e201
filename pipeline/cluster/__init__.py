"""Stages on other machines.

Owns: SLURM jobs, Ray jobs, Ray Train, the doctor. May import: stages and all below.
"""
