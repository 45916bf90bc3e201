#!/usr/bin/env bash
# Submits stages as a chain: each starts when the one before has succeeded, and is cancelled when it has failed.
#   jobs/slurm/pipeline.sh CONFIG_FOLDER RUN_FOLDER "STAGE STAGE ..." [sbatch options ...]
#   jobs/slurm/pipeline.sh configs/smoke runs/smoke "shard vqvae pretrain gan evaluate promote" --time=10
# The configurations name their inputs, so RUN_FOLDER/STAGE must be where they look.
set -euo pipefail
configs=$1 runs=$2 stages=$3
previous=
for stage in $stages; do
  job=$(sbatch --parsable --job-name="illm-$stage" ${previous:+--dependency=afterok:"$previous" --kill-on-invalid-dep=yes} \
    "${@:4}" jobs/slurm/stage.sbatch "$stage" "$configs/$stage.yaml" "$runs/$stage")
  echo "$stage: job $job, run $runs/$stage, log slurm-$job-illm-$stage.log"
  previous=$job
done
echo "watch: squeue --me    cancel: scancel $previous and the jobs above"
