#!/usr/bin/env bash
# Trains on one machine of a TPU pod; launch/tpu/tpu.sh runs it on all of them.
#
#   bash launch/tpu/worker.sh --config=FILE[:arg] --workdir=gs://BUCKET/RUN …
#
# --dry-run   prints the commands, and does nothing
#
# It asks the machine which of how many it is. When a process of the run is lost, it
# begins again, up to 100 times, from the last checkpoint.
set -euo pipefail

# shellcheck source=launch/env.sh
. "$(dirname "$0")/../env.sh"
# shellcheck source=launch/command.sh
. "$root/launch/command.sh"

given=()
for option in "$@"; do
  case "$option" in
    -h | --help) show_help "$0"; exit ;;
    --dry-run) dry_run=yes ;;
    *) given+=("$option") ;;
  esac
done

# metadata KEY: what the machine knows of itself; nothing where it does not.
metadata() {
  curl -sf -H 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1" || true
}

# Of lines "KEY: 'value'", the value.
from_env() { sed -n "s/^$1: *'\{0,1\}\([^']*\)'\{0,1\}$/\1/p" <<<"$tpu_env"; }

worker="$(metadata agent-worker-number)"
endpoints="$(metadata worker-network-endpoints)"
tpu_env="$(metadata tpu-env)"
[ -n "$worker" ] && [ -n "$endpoints" ] \
  || die "the metadata server names no worker: is this a machine of a TPU pod?"
# "host,host,…" or "name:id:ip,name:id:ip,…"
IFS=, read -ra hosts <<<"$endpoints"
first="${hosts[0]##*:}"
count="${#hosts[@]}"
slices="$(from_env MEGASCALE_NUM_SLICES)"
if [ "${slices:-1}" -gt 1 ]; then
  slice="$(from_env MEGASCALE_SLICE_ID)"
  first="$(from_env MEGASCALE_COORDINATOR_ADDRESS)"
  first="${first%%:*}"
  worker=$((worker + slice * count))
  count=$((count * slices))
fi
if [ "$count" -gt 1 ]; then
  export VLP_JAX_COORDINATOR="$first:8482" VLP_JAX_NUM_PROCESSES="$count"
  export VLP_JAX_PROCESS_ID="$worker"
  say "process $worker of $count, the first is $first"
fi
export VLP_JAX_ACCELERATOR=tpu
cd "$root"
if [ -n "$dry_run" ]; then
  quoted "$python" -m vlp_jax.train "${given[@]}"
  exit
fi
child="" stop=""
trap 'stop=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM INT
running="$(cat ../vlp_jax.pid 2>/dev/null || true)"
if [ -n "$running" ] && kill -0 "$running" 2>/dev/null; then
  die "a run is already there, pid $running: tpu.sh stop ends it."
fi
printf '%s\n' "$$" >../vlp_jax.pid
# shellcheck disable=SC2119 # no extras
prepare
for ((tried = 0; tried <= 100; tried++)); do
  "$python" -m vlp_jax.train "${given[@]}" &
  child=$!
  while :; do
    code=0
    wait "$child" || code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  # 75: another process was lost. 128 + 6, 7, 9, 11: died of a signal.
  case "$code" in 75 | 134 | 135 | 137 | 139) ;; *) break ;; esac
  [ -z "$stop" ] || break
  say "a process was lost (exit code $code): goes on from the last checkpoint"
  sleep 5
done
exit "$code"
