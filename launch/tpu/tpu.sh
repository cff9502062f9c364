#!/usr/bin/env bash
# Trains on a TPU pod of Google Cloud, as a queued resource.
#
#   bash launch/tpu/tpu.sh COMMAND --name=NAME --zone=ZONE [option …]
#
# create    asks for it: --type=v5litepod-16, and --spot, --reserved, --slices=N (several
#           pods that train one model), --runtime=VERSION, --valid-for=6h, --network=NAME
# wait      until it is there: --limit=SECONDS (default: as long as it takes)
# copy      this clone's files to all of its machines
# run       trains on all of them: --config=FILE[:arg] --workdir=gs://BUCKET/RUN
#           [--config.a.b=value …]; returns when it has begun
# logs      follows the log of a machine: --worker=N (default 0), or all
# stop      SIGTERM: saves, and leaves. `run` goes on
# resume    what `run` began goes on after a preemption: deletes what is left of the
#           machines, and creates, waits, copies and runs; options of all four
# watch     `resume`, as often as the machines are preempted: --every=SECONDS (300)
# status    of the queued resource
# delete    the queued resource and its machines
#
# --project=NAME    default: gcloud's
# --dry-run         prints the commands, and does nothing
#
# The workdir is where all machines can write and the next ones can read: a bucket. A
# machine that is lost takes the others down, and all begin again from the last
# checkpoint by themselves; when the pod is preempted as a whole, `resume` or `watch` is
# wanted.
set -euo pipefail

# shellcheck source=launch/env.sh
. "$(dirname "$0")/../env.sh"
# shellcheck source=launch/command.sh
. "$root/launch/command.sh"

name="" zone="" project="" type="" runtime="" spot="" reserved="" slices=1
valid_for="" network="" limit="" config="" workdir="" worker=0 every=300
rest=()
subcommand="${1:-}"
case "$subcommand" in
  create | wait | copy | run | logs | stop | resume | watch | status | delete) shift ;;
  -h | --help) show_help "$0"; exit ;;
  "") die "say what: create, wait, copy, run, logs, stop, resume, watch, status or delete. See --help." ;;
  *) die "no command $subcommand. See --help." ;;
esac
for option in "$@"; do
  value="${option#*=}"
  case "$option" in
    -h | --help) show_help "$0"; exit ;;
    --name=*) name="$value" ;;
    --zone=*) zone="$value" ;;
    --project=*) project="$value" ;;
    --type=*) type="$value" ;;
    --runtime=*) runtime="$value" ;;
    --spot) spot=yes ;;
    --reserved) reserved=yes ;;
    --slices=*) slices="$value"; number --slices "$slices" ;;
    --valid-for=*) valid_for="$value" ;;
    --network=*) network="$value" ;;
    --limit=*) limit="$value"; number --limit "$limit" ;;
    --every=*) every="$value"; number --every "$every" ;;
    --config=*) config="$value" ;;
    --workdir=*) workdir="$value" ;;
    --worker=*) worker="$value" ;;
    --dry-run) dry_run=yes ;;
    --config.*=* | --traceback) rest+=("$option") ;;
    *) die "no option $option. See --help." ;;
  esac
done
need --name "$name" "of the queued resource"
need --zone "$zone" "e.g. us-west4-a"
case "$subcommand" in
  create | resume | watch)
    need --type "$type" "e.g. v5litepod-16"
    [ -z "$spot" ] || [ -z "$reserved" ] || die "--spot and --reserved: say one of them."
    ;;
esac
case "$subcommand" in
  run | resume | watch)
    need --config "$config" "a file of configs/"
    need --workdir "$workdir" "a bucket, gs://BUCKET/RUN"
    case "$workdir" in
      gs://?*) ;;
      *) die "--workdir=$workdir: the machines share no disk: say gs://BUCKET/RUN." ;;
    esac
    cd "$root"
    config_is_there "$config"
    ;;
esac
case "$worker" in
  all) ;;
  *) number --worker "$worker" 0 ;;
esac
[ -n "$dry_run" ] || command -v gcloud >/dev/null || die "there is no gcloud: install the Google Cloud CLI."

where=(--zone="$zone")
[ -z "$project" ] || where+=(--project="$project")
qr=(gcloud compute tpus queued-resources)

# The image that Google recommends for each generation.
runtime_version() {
  if [ -n "$runtime" ]; then
    printf '%s\n' "$runtime"
    return
  fi
  case "$type" in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) die "--type=$type: say its image too: --runtime=VERSION." ;;
  esac
}

do_create() {
  local version options
  version="$(runtime_version)" || exit 1
  options=(--accelerator-type="$type" --runtime-version="$version")
  if [ "$slices" -gt 1 ]; then
    options+=(--node-count="$slices" --node-prefix="$name")
  else
    options+=(--node-id="$name")
  fi
  [ -z "$spot" ] || options+=(--spot)
  [ -z "$reserved" ] || options+=(--reserved)
  [ -z "$valid_for" ] || options+=(--valid-until-duration="$valid_for")
  [ -z "$network" ] || options+=(--network="$network")
  run "${qr[@]}" create "$name" "${where[@]}" "${options[@]}"
}

describe=("${qr[@]}" describe "$name" "${where[@]}" '--format=value(state.state)')

# Its state, or NONE where there is no such resource; other errors are gcloud's.
state() {
  local text
  if text="$("${describe[@]}" 2>&1)"; then
    printf '%s\n' "${text##*$'\n'}"
  elif [[ "$text" == *NOT_FOUND* ]]; then
    echo NONE
  else
    die "gcloud: $text"
  fi
}

do_wait() {
  local now before="" begun=$SECONDS
  if [ -n "$dry_run" ]; then
    quoted "${describe[@]}"
    return
  fi
  while :; do
    now="$(state)" || exit 1
    [ "$now" = "$before" ] || say "$name is $now"
    before="$now"
    case "$now" in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING | NONE)
        die "$name is $now and will not come: see $0 status; delete and create it anew."
        ;;
    esac
    if [ -n "$limit" ] && [ $((SECONDS - begun)) -ge "$limit" ]; then
      die "$name is still $now after $limit s."
    fi
    sleep 15
  done
}

# on WORKER COMMAND: runs it there, on every pod.
on() {
  run "${qr[@]}" ssh "$name" "${where[@]}" --node=all --worker="$1" --command="$2"
}

do_copy() {
  local archive=vlp_jax.tar.gz folder="${TMPDIR:-/tmp}/vlp_jax.$$" list
  # What git knows or would: no runs, no environment, no data.
  list="$(quoted git -C "$root" ls-files -z --cached --others --exclude-standard)"
  run mkdir -p "$folder"
  run bash -o pipefail -c \
    "$list -- ':!tests' | $(quoted tar -C "$root" -czf "$folder/$archive" --null -T -)"
  run "${qr[@]}" scp "$folder/$archive" "$name:" "${where[@]}" --node=all --worker=all
  run rm -r "$folder"
  on all "mkdir -p vlp_jax && tar -C vlp_jax -xzf $archive && bash vlp_jax/launch/prepare.sh tpu"
}

do_run() {
  # In a session of its own, so that it outlives the connection.
  on all "cd vlp_jax && { setsid nohup bash launch/tpu/worker.sh $(
    quoted "--config=$config" "--workdir=$workdir" "${rest[@]}"
  ) >>../vlp_jax.log 2>&1 </dev/null & } && sleep 1"
}

do_logs() { on "$worker" "tail -n 100 -F vlp_jax.log"; }
do_stop() { on all "kill -TERM \$(cat vlp_jax.pid)"; }
do_status() { run "${qr[@]}" describe "$name" "${where[@]}"; }
do_delete() { run "${qr[@]}" delete "$name" "${where[@]}" --force --quiet; }

do_resume() {
  local now
  if [ -n "$dry_run" ]; then
    quoted "${describe[@]}"
    now=SUSPENDED
  else
    now="$(state)" || exit 1
  fi
  case "$now" in
    ACTIVE) say "$name is ACTIVE: nothing to resume (run begins what was stopped)."; return ;;
    NONE) ;;
    WAITING_FOR_RESOURCES | PROVISIONING | CREATING | ACCEPTED) say "$name is $now" ;;
    *) say "$name is $now: deletes it, and asks for another"; do_delete; now=NONE ;;
  esac
  [ "$now" != NONE ] || [ -z "$dry_run" ] || say "(as if it were preempted)"
  [ "$now" != NONE ] || do_create
  do_wait
  do_copy
  do_run
}

do_watch() {
  while :; do
    do_resume
    [ -z "$dry_run" ] || return 0
    sleep "$every"
  done
}

"do_$subcommand"
