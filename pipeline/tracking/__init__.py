"""MLflow runs: what a stage tells its tracking store, now or when the store is back.

Owns: the store and its errors, one run per stage, the journal, its delivery, provenance, system metrics.
May import: artifacts, storage, config. One of the three packages that import mlflow.
"""
