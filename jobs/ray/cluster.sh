#!/usr/bin/env bash
# Starts a one-node Ray cluster on this machine, to try `illm submit ray`. `ray stop` ends every Ray process of the host.
set -euo pipefail
: "${ILLM_VENV:=$PWD/.venv}"
export RAY_AUTH_MODE=token # without it, whoever reaches the port can run code
"$ILLM_VENV/bin/ray" get-auth-token --generate >/dev/null
exec "$ILLM_VENV/bin/ray" start --head --dashboard-host 127.0.0.1 --dashboard-port 8265 --disable-usage-stats "$@"
