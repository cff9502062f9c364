#!/usr/bin/env bash
# Trains on the GPUs of this machine (or its CPU, where there are none).
#
#   bash launch/local_gpu.sh --config=FILE[:arg] --workdir=DIR [--config.a.b=value …]
#
# --gpus=0,2        those GPUs; default: all. One process drives them all.
# --processes=N     N processes, each with its share of them (default 1)
# --restarts=N      how often to go on after a process was lost (default 3)
# --dry-run         prints the commands, and does nothing
#
# What is not an option here is the trainer's. The variables of launch/env.sh choose
# Python, environment and accelerator. Ctrl-C or SIGTERM: it saves, and leaves; the same
# command goes on.
set -euo pipefail

# shellcheck source=launch/env.sh
. "$(dirname "$0")/env.sh"
# shellcheck source=launch/command.sh
. "$root/launch/command.sh"

config="" workdir="" gpus="" processes=1 restarts=3
rest=()
for option in "$@"; do
  case "$option" in
    -h | --help) show_help "$0"; exit ;;
    --config=*) config="${option#*=}" ;;
    --workdir=*) workdir="${option#*=}" ;;
    --gpus=*) gpus="${option#*=}"; [ -n "$gpus" ] || die "--gpus=: name some." ;;
    --processes=*) processes="${option#*=}" ;;
    --restarts=*) restarts="${option#*=}" ;;
    --dry-run) dry_run=yes ;;
    --config.*=* | --traceback) rest+=("$option") ;;
    *) die "no option $option. See --help." ;;
  esac
done
need --config "$config" "a file of configs/"
need --workdir "$workdir" "a folder for the run"
number --processes "$processes"
number --restarts "$restarts" 0
case "$workdir" in /* | *://*) ;; *) workdir="$PWD/$workdir" ;; esac
cd "$root"
config_is_there "$config"

# Ids of GPUs: those named, or all; none without a driver.
ids=()
if [ -n "$gpus" ]; then
  case "$gpus" in
    *[!0-9,]* | ,* | *, | *,,*) die "--gpus=$gpus: want numbers, e.g. --gpus=0,2." ;;
  esac
  IFS=, read -ra ids <<<"$gpus"
elif [ "$processes" -gt 1 ] && [ "$(accelerator)" = cuda ]; then
  mapfile -t ids < <(nvidia-smi --query-gpu=index --format=csv,noheader)
fi
if [ "${#ids[@]}" -gt 0 ] && [ $((${#ids[@]} % processes)) -ne 0 ]; then
  die "--processes=$processes: ${#ids[@]} GPUs do not divide by it."
fi
share=$((${#ids[@]} / processes))

command=(-m vlp_jax.train "--config=$config" "--workdir=$workdir" "${rest[@]}")
# shellcheck disable=SC2119 # no extras
[ -n "$dry_run" ] || prepare
command=("$python" "${command[@]}")

# Environment of process $1, as arguments of `env`.
place() {
  settings=()
  if [ "$share" -gt 0 ]; then
    local mine=("${ids[@]:$(($1 * share)):$share}")
    settings+=("CUDA_VISIBLE_DEVICES=$(IFS=,; printf '%s' "${mine[*]}")")
  fi
  if [ "$processes" -gt 1 ]; then
    settings+=("VLP_JAX_COORDINATOR=localhost:$port" "VLP_JAX_NUM_PROCESSES=$processes")
    settings+=("VLP_JAX_PROCESS_ID=$1")
  fi
}

pids=()
stop=""
trap 'stop=yes; [ "${#pids[@]}" -eq 0 ] || kill -TERM "${pids[@]}" 2>/dev/null' TERM INT

# Runs all processes to their end; $code is that of the first that says what is wrong.
attempt() {
  local i pid got
  pids=() code=0
  for ((i = 0; i < processes; i++)); do
    place "$i"
    env "${settings[@]}" "${command[@]}" &
    pids+=("$!")
  done
  for pid in "${pids[@]}"; do
    while :; do
      got=0
      wait "$pid" || got=$?
      # A signal to this script ends `wait`, not the process.
      kill -0 "$pid" 2>/dev/null || break
    done
    case "$code,$got" in *,0) ;; 0,* | 75,*) code="$got" ;; esac
  done
}

port=$((61440 + $$ % 4096))
if [ -n "$dry_run" ]; then
  port=61440
  for ((i = 0; i < processes; i++)); do
    place "$i"
    if [ "${#settings[@]}" -gt 0 ]; then
      quoted env "${settings[@]}" "${command[@]}"
    else
      quoted "${command[@]}"
    fi
  done
  exit
fi
for ((tried = 0; ; tried++)); do
  attempt
  # 75: another process was lost. 128 + 6, 7, 9, 11: died of a signal.
  case "$code" in 75 | 134 | 135 | 137 | 139) ;; *) exit "$code" ;; esac
  if [ -n "$stop" ] || [ "$tried" -ge "$restarts" ]; then exit "$code"; fi
  say "a process was lost (exit code $code): goes on from the last checkpoint," \
    "$((restarts - tried)) more time(s)."
done
