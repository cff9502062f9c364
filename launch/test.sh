#!/usr/bin/env bash
# Runs the linter and the tests, in the environment of launch/env.sh.
#
#   bash launch/test.sh [pytest's arguments]
set -euo pipefail

# shellcheck source=launch/env.sh
. "$(dirname "$0")/env.sh"
cd "$root"
prepare test

"$python" -m ruff check .
"$python" -m ruff format --check .
# A file is one worker's; a worker takes about 3 GB.
exec "$python" -m pytest -n auto --maxprocesses 4 --dist loadfile \
  --no-loadscope-reorder "$@"
