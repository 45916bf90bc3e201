"""The load of the machine during a run, under the names of MLflow's page."""

import threading
import time
from contextlib import suppress

from pipeline.tracking.journal import Journal

# Seconds between two samples
SAMPLE_EVERY = 10.0


class SystemMetrics:
    """Records the load of processors, memory, disk, network and GPUs under the names of MLflow's page."""

    def __init__(self, journal: Journal, began: float):
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._journal, self._began = journal, began
        self._monitors = []
        for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
            # No GPU, no driver, no access to counters: it is left out
            with suppress(Exception):
                monitor = kind()
                monitor.collect_metrics()
                self._monitors.append(monitor)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="machine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(SAMPLE_EVERY)

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_EVERY):
            values: dict[str, float] = {}
            for monitor in self._monitors:
                with suppress(Exception):
                    monitor.collect_metrics()
                    values |= {f"system/{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
                    monitor.clear_metrics()
            # Steps are seconds since the run's first attempt began
            now = time.time()
            self._journal.metrics(int(now - self._began), values, time_ms=int(now * 1000))
