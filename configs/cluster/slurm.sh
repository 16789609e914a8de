#!/usr/bin/env bash
# Five nodes of a Slurm cluster for one run: four train, the fifth evaluates the checkpoints.
#   sbatch configs/cluster/slurm.sh configs/ebt_1b.yaml runs/ebt_1b [key=value ...]
# from the checkout, on a file system that all nodes share, with .venv in it.
#SBATCH --job-name=ebwm
#SBATCH --nodes=5
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Ten minutes before the time limit this script (B:) gets SIGTERM; it stops the run, which saves, and requeues the job.
#SBATCH --signal=B:TERM@600
set -euo pipefail

config=$1 run_dir=$2
shift 2
name=$(basename "$run_dir")
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
dashboard=http://127.0.0.1:8265  # of the first node, where this script runs
if [[ -f .venv/bin/activate ]]; then source .venv/bin/activate; fi

# Whoever can reach a Ray cluster can run code on it, as its user. Here only those who can read this file of the user's.
export RAY_AUTH_MODE=token
(umask 077 && ray get-auth-token --generate > /dev/null)  # ~/.ray/auth_token
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600  # seconds; 30 are few where many nodes read one file system

# The exit code of the run: symmetric-run may exit with 1 after a success, when it loses the cluster that it stops.
exit_code=$(mktemp)
srun --kill-on-bad-exit=1 ray symmetric-run --address "${nodes[0]}:6379" --min-nodes "$SLURM_JOB_NUM_NODES" -- \
    bash -c '"$@"; echo $? > "$0"' "$exit_code" \
    python launchers/submit.py --address "$dashboard" --name "$name" --config "$config" \
    --num-nodes $((SLURM_JOB_NUM_NODES - 1)) --gpus-per-node 8 run_dir="$run_dir" \
    evaluation.workers=8 evaluation.gpus_per_worker=1 "$@" &
run=$!

stopped=
trap 'stopped=yes; python launchers/submit.py --address "$dashboard" stop "$name" || true' TERM
wait "$run" || true
if [[ -n $stopped ]]; then
    wait "$run" || true  # the signal only interrupted the first wait
    scontrol requeue "$SLURM_JOB_ID"
fi
code=$(cat "$exit_code")
rm "$exit_code"
exit "${code:-1}"
