#!/usr/bin/env bash
# Makes the environment of launch/env.sh, ahead of a job that uses it.
#
#   bash launch/prepare.sh [cpu | cuda | tpu]   default: what this machine has
#
# The login node of a cluster has no GPU where its nodes have: say cuda there.
set -euo pipefail

case "${1:-}" in -h | --help) sed -n '2,/^set /{s/^# \{0,1\}//;/^set /!p;}' "$0"; exit ;; esac
# shellcheck source=launch/env.sh
. "$(dirname "$0")/env.sh"
[ $# -le 1 ] || die "one argument at most: cpu, cuda or tpu."
VLP_JAX_ACCELERATOR="${1:-${VLP_JAX_ACCELERATOR:-}}"
export VLP_JAX_ACCELERATOR
# shellcheck disable=SC2119 # no extras
prepare
say "ready: $python"
