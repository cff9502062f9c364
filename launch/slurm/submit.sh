#!/usr/bin/env bash
# Submits a run to SLURM; it survives preemption and the time limit by being requeued.
#
#   bash launch/slurm/submit.sh --config=FILE[:arg] --workdir=DIR --nodes=N
#     [--config.a.b=value …]
#
# --gpus-per-node=N    GPUs of each node (default: none, CPUs alone)
# --tasks-per-node=N   processes of each node (default 1, which drives all its GPUs)
# --cpus-per-task=N    (default: as the cluster has it)
# --time=LIMIT --partition=NAME --account=NAME --qos=NAME --job-name=NAME   as sbatch's
# --grace=SECONDS      so long before the time limit it saves and is requeued (default
#                      120); a preemption gives the cluster's GraceTime
# --requeues=N         how often it goes on (default 100)
# --python=FILE        interpreter on the nodes (default: the environment of
#                      launch/env.sh, which has to be made before: launch/prepare.sh)
# --sbatch=OPTION      one more option of sbatch, as often as wanted
# --dry-run            prints the command, and does nothing
#
# The workdir and this clone have to be on a file system that all nodes share. The log is
# DIR/slurm-JOB.log. `scancel JOB` ends it for good, `scancel --signal=TERM JOB` saves and
# requeues it.
set -euo pipefail

# shellcheck source=launch/env.sh
. "$(dirname "$0")/../env.sh"
# shellcheck source=launch/command.sh
. "$root/launch/command.sh"

config="" workdir="" nodes="" gpus="" tasks=1 cpus="" grace=120 requeues=100 name=""
interpreter="$python"
rest=() more=()
for option in "$@"; do
  value="${option#*=}"
  case "$option" in
    -h | --help) show_help "$0"; exit ;;
    --config=*) config="$value" ;;
    --workdir=*) workdir="$value" ;;
    --nodes=*) nodes="$value" ;;
    --gpus-per-node=*) gpus="$value"; number --gpus-per-node "$gpus" ;;
    --tasks-per-node=*) tasks="$value" ;;
    --cpus-per-task=*) cpus="$value"; number --cpus-per-task "$cpus" ;;
    --time=* | --partition=* | --account=* | --qos=*)
      need "${option%%=*}" "$value" "a value"
      more+=("$option")
      ;;
    --job-name=*) name="$value" ;;
    --grace=*) grace="$value" ;;
    --requeues=*) requeues="$value" ;;
    --python=*) interpreter="$value" ;;
    --sbatch=*) more+=("$value") ;;
    --dry-run) dry_run=yes ;;
    --config.*=* | --traceback) rest+=("$option") ;;
    *) die "no option $option (one more of sbatch's: --sbatch=$option). See --help." ;;
  esac
done
need --config "$config" "a file of configs/"
need --workdir "$workdir" "a folder that all nodes share"
need --nodes "$nodes" "how many"
number --nodes "$nodes"
number --tasks-per-node "$tasks"
number --grace "$grace"
number --requeues "$requeues" 0
if [ -n "$gpus" ] && [ $((gpus % tasks)) -ne 0 ]; then
  die "--tasks-per-node=$tasks: $gpus GPUs do not divide by it."
fi
case "$workdir" in /* | *://*) ;; *) workdir="$PWD/$workdir" ;; esac
cd "$root"
config_is_there "$config"
if [ -z "$dry_run" ]; then
  command -v sbatch >/dev/null || die "there is no sbatch: is this a node of the cluster?"
  [ -x "$interpreter" ] \
    || die "there is no $interpreter: bash launch/prepare.sh cuda makes it, --python=… names another."
fi

# A requeued job goes on in the same log.
options=(--job-name="${name:-$(basename "$workdir")}" --nodes="$nodes")
options+=(--ntasks-per-node="$tasks")
[ -z "$gpus" ] || options+=(--gpus-per-node="$gpus")
[ -z "$cpus" ] || options+=(--cpus-per-task="$cpus")
case "$workdir" in
  *://*) options+=(--output="slurm-%j.log") ;;
  *)
    options+=(--output="$workdir/slurm-%j.log")
    run mkdir -p "$workdir"
    ;;
esac
# Of the tasks, not of the batch script: they save, it requeues.
options+=(--open-mode=append --requeue --signal="TERM@$grace" "${more[@]}")
export VLP_JAX_PYTHON="$interpreter" VLP_JAX_REQUEUES="$requeues"
if [ -n "$dry_run" ]; then
  quoted export VLP_JAX_PYTHON="$interpreter" VLP_JAX_REQUEUES="$requeues"
fi
run sbatch "${options[@]}" launch/slurm/train.sbatch \
  "--config=$config" "--workdir=$workdir" "${rest[@]}"
