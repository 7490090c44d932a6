#!/usr/bin/env bash
# Four workers of one search: sbatch recipes/distributed/slurm.sh experiment.yaml. An example, not run on a cluster.
#SBATCH --job-name=emorl-search
#SBATCH --array=0-3
#SBATCH --gres=gpu:1
#SBATCH --time=04:00:00
#SBATCH --requeue
set -euo pipefail
export EMORL_HOST="$SLURM_ARRAY_JOB_ID-$SLURM_ARRAY_TASK_ID"   # stays the same when the job is queued again
srun emorl search "$1" --storage "postgresql+psycopg://emorl@${EMORL_DATABASE:?a host}/studies"
