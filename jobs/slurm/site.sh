# shellcheck shell=bash
# The one file to edit for a cluster. Sourced by the job scripts here; every line can be overridden from the environment.
: "${ILLM_VENV:=$PWD/.venv}"                        # the virtual environment that `make setup` made, on a shared file system
: "${ILLM_PORT:=$((20000 + SLURM_JOB_ID % 20000))}" # where the ranks meet, on the first node
: "${ILLM_MASTER:=}"                                # the first node's address; empty: the name SLURM gives it
