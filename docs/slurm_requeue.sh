#!/bin/bash
# Training that goes on after the time limit of a Slurm job: sbatch docs/slurm_requeue.sh experiment=pydocs
# Ten minutes before the limit Slurm sends SIGUSR1 to this script alone, which asks the training to end: the step under
# way is finished and saved. Then the job is queued again, under the same number, and resumes. Queues that take jobs away
# for others (PreemptMode=REQUEUE) send SIGTERM, which does the same, and queue the job again themselves.
# For several processes: LAUNCH="accelerate launch --multi_gpu --num_processes 4" sbatch docs/slurm_requeue.sh …
# One takes python alone: `accelerate launch` of one process passes no signal on, and leaves it behind.
#SBATCH --job-name=sgpt
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

${LAUNCH:-python} train/biencoder.py "$@" resume=true &
training=$!
limit_is_near=
trap 'limit_is_near=yes; kill -TERM $training' USR1
trap 'kill -TERM $training' TERM

# A signal ends `wait` before it ends the training.
while kill -0 $training 2>/dev/null; do
  wait $training
  code=$?
done

# The launcher of several processes ends with 1 whatever happened to them, so it is the request that counts.
if [ -n "$limit_is_near" ] && [ $code -ne 0 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
