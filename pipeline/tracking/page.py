"""Where people look at the runs: MLflow's page."""

from pipeline.tracking import store


def command() -> str:
    """What a user types to look at the runs."""
    if store.uri().startswith("sqlite:///"):
        return f"mlflow ui --backend-store-uri {store.uri()}"
    return f"the tracking server's page at {store.masked_uri()}"


def address(experiment_id: str) -> str:
    """Where that page has the runs of an experiment with their curves, in the mode for training models."""
    base = "http://127.0.0.1:5000" if store.uri().startswith("sqlite:///") else store.masked_uri().rstrip("/")
    return f"{base}/#/experiments/{experiment_id}/runs?workflowType=machine_learning&compareRunsMode=CHART"
