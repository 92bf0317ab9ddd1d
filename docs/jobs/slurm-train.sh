#!/bin/bash
#SBATCH --job-name=remit-train
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# srun hands the TERM to torchrun, which hands it to the ranks: they finish the step, save and end
srun torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node=8 \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head:29500" \
    --no-python remit train --shards "$SCORED" --model "$BASE" --out "$RUN" --objective remit \
    --global-batch-size 512 --micro-batch-size 2 --checkpoint-every 200
