# shellcheck shell=bash disable=SC2034  # what is set here is used by the scripts that source it
# The one file to edit for a cluster. Every line can be overridden from the environment.
: "${ILLM_VENV:=$PWD/.venv}"     # the virtual environment that `make setup` made, on a shared file system
: "${ILLM_CONTAINER:=}"          # a command before every Python, for instance: apptainer exec --nv --bind /data illm.sif
: "${ILLM_PYTHON:=$ILLM_VENV/bin/python}" # in a container: its python3
: "${ILLM_LAUNCH:=}"             # a file of configs/launch; empty: DDP, one process per GPU, or one per node without GPUs
: "${ILLM_PROCESSES:=}"          # processes per node; empty: as many as the job has GPUs on a node
: "${ILLM_MASTER_ADDR:=}"             # the first node's address; empty: the name SLURM gives it
: "${ILLM_MASTER_PORT:=$((20000 + SLURM_JOB_ID % 20000))}" # where the processes meet, on the first node
: "${ILLM_FILE_WAIT_S:=120}"   # seconds to wait for files of other nodes that the shared file system does not show yet
: "${ILLM_MAX_RESTARTS:=100}"   # a job that was requeued so often has something wrong with it
# For your site's modules, proxies and network cards, for instance:
#   module load cuda/12.8
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 TORCH_HOME=/shared/torch  # processes talk over both
export ILLM_FILE_WAIT_S
export PYTHONUNBUFFERED=1 MLFLOW_DISABLE_TELEMETRY=true RAY_USAGE_STATS_ENABLED=0
