"""MLflow runs: what a stage sends to its tracking store, now or when the store is reachable again.

Owns: the store and its errors, one run per stage, the journal, its delivery, provenance, system metrics.
May import: artifacts, storage, config. One of the three packages that import mlflow.
"""
