#!/usr/bin/env bash
# Runs one stage or a sweep as a Ray job on a running cluster. Needs requirements/jobs.txt, and RAY_ADDRESS=http://HEAD:8265.
#   jobs/ray/submit.sh STAGE CONFIG.yaml RUN_FOLDER [key=value ...]
# The project's folder and its virtual environment must be on a file system that the cluster's nodes share.
set -euo pipefail
: "${ILLM_VENV:=$PWD/.venv}"
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}" # the token lies in ~/.ray/auth_token or $RAY_AUTH_TOKEN
exec "$ILLM_VENV/bin/ray" job submit --address "${RAY_ADDRESS:-http://127.0.0.1:8265}" -- \
  bash -c "cd $(printf %q "$PWD") && RAY_ADDRESS=auto exec $(printf '%q ' "$ILLM_VENV/bin/python" -m pipeline "$1" "$2" "run=$3" "${@:4}")"
