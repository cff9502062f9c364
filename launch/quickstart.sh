#!/usr/bin/env bash
# Pretrains a small ALBEF on rendered scenes, evaluates it and writes a report.
#
#   bash launch/quickstart.sh [--config.a.b=value …]
#
# WORKDIR=…  where everything goes; default: runs/quickstart in the clone. The variables
# of launch/env.sh choose Python, environment and accelerator. Interrupted and started
# again, it goes on from its last checkpoint.
set -euo pipefail

case "${1:-}" in -h | --help) sed -n '2,/^set /{s/^# \{0,1\}//;/^set /!p;}' "$0"; exit ;; esac

here="$(cd "$(dirname "$0")" && pwd)"
workdir="${WORKDIR:-$here/../runs/quickstart}"
mkdir -p "$workdir"
workdir="$(cd "$workdir" && pwd)"
# shellcheck source=launch/env.sh
. "$here/env.sh"
cd "$root"

say "quickstart: trains a small ALBEF on pictures that it draws, evaluates it, and writes"
say "$workdir/report.html. Six minutes on two CPU cores, after the installation."
if [ -n "$(ls -A "$workdir")" ]; then
  say "goes on with the run that is there; remove the folder to begin anew."
fi
# shellcheck disable=SC2119 # the arguments are the trainer's, and no extras
prepare
exec "$python" -m vlp_jax.train --config=configs/quickstart.py --workdir="$workdir" "$@"
