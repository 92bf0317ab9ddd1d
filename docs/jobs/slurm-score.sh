#!/bin/bash
#SBATCH --job-name=remit-score
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RAY_ADDRESS="$head:6379"

srun --nodes=1 --ntasks=1 --nodelist="$head" ray start --head --port=6379 --block &
sleep 20
srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" \
    ray start --address="$RAY_ADDRESS" --block &
sleep 20

# the shell gets Slurm's TERM two minutes before the end and hands it on; exit code 3 means: submit again
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
    remit score --shards "$PACKED" --model "$REFERENCE" --name rl --out "$SCORED" &
score=$!
trap 'kill -TERM $score' TERM
code=0
wait $score || code=$?
if [ "$code" -gt 128 ]; then  # the trap cut the wait short
    code=0
    wait $score || code=$?
fi
if [ "$code" -eq 3 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
