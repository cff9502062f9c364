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
exec "$python" -m pytest "$@"
