"""Prints SHA-256 digests of what the smoke runs make: `python -m tests.digests`, about two minutes.

A change that is meant to change nothing, a move or a new name, prints the same lines as before on the same machine: the
shards' bytes, the trained weights, and the files that the trained codecs write. `python -m tests.digests > before`, change,
`python -m tests.digests | diff before -`.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
MADE = ("*.tar", "*.safetensors", "*.illm")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        # one thread: the order of sums must not depend on how many cores are free
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "ILLM_CACHE": f"{folder}/cache",
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            "PYTHONWARNINGS": "ignore",
        }
        demo = [sys.executable, "-m", "pipeline", "demo", "configs/smoke", "--run", str(runs)]
        done = subprocess.run(demo, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{done.stdout}\n{done.stderr}")
        found = sorted(path for pattern in MADE for path in runs.rglob(pattern) if "artifact" in path.parts)
        if {path.suffix for path in found} != {Path(pattern).suffix for pattern in MADE}:
            sys.exit(f"expected files {', '.join(MADE)} in the runs' artifacts, found {', '.join(map(str, found))}")
        for path in found:
            print(hashlib.sha256(path.read_bytes()).hexdigest(), path.relative_to(runs))


if __name__ == "__main__":
    main()
