#!/bin/bash
# Slurm: several nodes, eight GPUs each, one launcher a node; saves, ends and queues itself again in time.
#   sbatch --nodes 8 recipes/slurm.sh recipes/hsdp.yaml recipes/janus_pro_7b.yaml --gradient-accumulation-steps 1
# First the configuration for `accelerate launch`, then the training recipe, then options that win over it.
# Run it from the repository's folder, with the environment active. Memory: as the two files say.
#
# Ten minutes before the time limit, and when Slurm takes the nodes away for another job (SIGTERM), training
# finishes its step, saves and ends (train/signals.py); the job is then queued again and goes on from that
# checkpoint. A job that fails by itself is not queued again. A checkpoint must fit into the ten minutes, and
# into the partition's GraceTime: see the line `disk` of `minimal-aia plan`.
#SBATCH --job-name=minimal-aia
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -uo pipefail

if [ $# -lt 2 ]; then
    echo "usage: sbatch --nodes N recipes/slurm.sh ACCELERATE.yaml RECIPE.yaml [--key value ...]" >&2
    exit 2
fi
if [ -z "${SLURM_JOB_NUM_NODES:-}" ]; then
    echo "recipes/slurm.sh: this is no Slurm job: start it with sbatch --nodes N recipes/slurm.sh $*" >&2
    exit 2
fi
launch=$1
recipe=$2
shift 2
gpus=${SLURM_GPUS_ON_NODE:-8}
nodes=$SLURM_JOB_NUM_NODES
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

options=(--config_file "$launch" --num_machines "$nodes" --num_processes "$((nodes * gpus))"
    --main_process_ip "$head" --main_process_port "$((20000 + SLURM_JOB_ID % 20000))")
if grep -q parallelism_config_dp_replicate_size "$launch"; then # HSDP: a copy a node
    options+=(--parallelism_config_dp_replicate_size "$nodes" --parallelism_config_dp_shard_size "$gpus")
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

# The launcher must outlive the warning, or nobody waits for the checkpoint: it ignores USR1, and so would
# what it starts, but training sets its own handler. SIGTERM is turned into USR1: torchrun would pass it on
# and kill 30 seconds later whoever is still saving.
warned=0
warn() {
    warned=1
    interrupted=1
    kill -USR1 "$run" 2>/dev/null # srun passes it on to every process it started
}
trap warn USR1 TERM
srun --kill-on-bad-exit=1 bash -c 'trap "" USR1; exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' \
    launcher "${options[@]}" -m minimal_aia.train.sft "$recipe" \
    --num-processes "$((nodes * gpus))" --resume auto "$@" &
run=$!
interrupted=1
while [ "$interrupted" -eq 1 ]; do # a signal ends `wait`, not the run
    interrupted=0
    wait "$run"
    status=$?
done

if [ "$status" -ne 0 ] && [ "$warned" -eq 1 ]; then
    echo "queueing job $SLURM_JOB_ID again"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
