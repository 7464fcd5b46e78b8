#!/usr/bin/env bash
# A training run under Slurm that outlives its time limit: sbatch scripts/slurm_train.sh model=swin_cifar data=cifar10
#
# Shortly before the time limit Slurm sends SIGUSR1. vit-train ends the step it is in, saves, and exits with 138
# (128 + 10, the number of SIGUSR1 on Linux). This script then puts the job back into the queue. A requeued job
# keeps its id, and the run directory is named after it (runs/<name>/job_<id>), so the very same command finds
# the run and continues it, bit for bit, until it is at its end. Any other exit code ends the job with that code
# (0 done, 2 config, 3 data, 4 no valid checkpoint, 5 save failed, 6 non-finite, 7 memory, 8 worker lost).
#
# Choose partition, account, memory and GPUs for your cluster, here or on sbatch's command line.
#SBATCH --job-name=vit-train
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=04:00:00
#
# Five minutes before the end. Slurm looks at its clock about once a minute, so the signal may come up to a
# minute early; the time left has to cover one step and one save. No `B:` in front: with it, only the batch shell
# would get the signal, and bash attends to a signal only once the command it waits for is over. Without it, the
# job step gets it, that is what srun starts. So srun has to start vit-train itself, not a shell around it.
#SBATCH --signal=USR1@300
#
# Lets this script, and Slurm itself after a preemption or the failure of a node, put the job back; the newest
# checkpoint that verifies is where it goes on. SIGTERM saves as well, but ends the job (143): scancel sends it.
#SBATCH --requeue
#
# One log for all parts of the run, instead of one that each part overwrites.
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
#
# A sweep is an array of such jobs, each with a run directory and a requeue of its own:
#   sbatch --array=0-2 --output=slurm-%A_%a.out my_sweep.sh
# where my_sweep.sh is a copy of this file with two more lines before srun:
#   rates=(1e-4 3e-4 1e-3)
#   set -- "$@" "optimizer.lr=${rates[$SLURM_ARRAY_TASK_ID]}"

set -u
: "${SLURM_JOB_ID:?start this script with sbatch}"

stopped_by_usr1=$((128 + $(kill -l USR1)))

srun vit-train "$@"
code=$?

if [ "$code" -eq "$stopped_by_usr1" ]; then
    echo "job $SLURM_JOB_ID: saved before the time limit, back into the queue"
    scontrol requeue "$SLURM_JOB_ID" || echo "job $SLURM_JOB_ID: not requeued; submit it again with run_dir=..." >&2
fi
exit "$code"
