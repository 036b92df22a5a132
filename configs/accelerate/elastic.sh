#!/bin/bash
# One machine whose processes are started again, three times at most, when one of them dies: torchrun ends the others, and
# resume=true goes on from the last checkpoint. Run here with two processes on the CPU, one of them killed.
#   PROCESSES=8 configs/accelerate/elastic.sh experiment=pydocs             (with GPUs)
#   ACCELERATE_USE_CPU=true PROCESSES=2 configs/accelerate/elastic.sh experiment=pydocs
# Their number stays the same: batches and random states belong to it.
set -euo pipefail
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # else processes that start again find the addresses of the dead
exec torchrun --standalone --nproc-per-node "${PROCESSES:-2}" --max-restarts 3 train/biencoder.py resume=true "$@"
