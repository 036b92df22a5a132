#!/bin/bash
# Two machines of eight GPUs under Slurm, one torchrun on each. Run by Slurm 22.05 over two nodes of one CPU process each
# (ACCELERATE_USE_CPU=true sbatch --gpus-per-node=1 …), whose biases were those of two processes of one node; no GPU was at hand.
#   sbatch configs/accelerate/slurm.sh experiment=msmarco_2_7b data.path=<folder of MS MARCO>
# A job that is ended early, or whose machine fails, is submitted again as it is: resume=true goes on from its last
# checkpoint, and the threads, processes and data must be the same.
#SBATCH --job-name=sgpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
set -euo pipefail
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # else processes that start again find the addresses of the dead
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:29500" \
  train/biencoder.py resume=true "$@"
