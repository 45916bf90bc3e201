"""Who may be champion.

Owns: gates, the decision about a candidate, what is registered, how MLflow loads it.
May import: evaluation, bitstream, registry, tracking.
"""
