# shellcheck shell=bash
# Makes the environment of a fresh clone; the other scripts source this file.
#
#   prepare [EXTRA …]   a virtual environment with this package and its extras in it;
#                       sets $python to its interpreter. Instant where nothing changed.
#
# VLP_PYTHON=…           the interpreter to build it from (3.11 or newer)
# VLP_JAX_VENV=…         where it goes; default: .venv in the clone
# VLP_JAX_ACCELERATOR=…  cpu, cuda or tpu; default: what the machine has

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${VLP_JAX_VENV:-$root/.venv}"
python="$venv/bin/python"

say() { printf 'vlp_jax: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# Runs it rather than looks for it: pyenv leaves names on the PATH that do not run.
new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local name
  if [ -n "${VLP_PYTHON:-}" ]; then
    new_enough "$VLP_PYTHON" || die "VLP_PYTHON=$VLP_PYTHON is no Python of 3.11 or newer."
    printf '%s\n' "$VLP_PYTHON"
    return
  fi
  for name in python3.13 python3.12 python3.11 python3 python; do
    if new_enough "$name"; then
      command -v "$name"
      return
    fi
  done
  die "found no Python of 3.11 or newer; install one, or say VLP_PYTHON=/path/to/python."
}

venv_works() {
  new_enough "$python" && "$python" -m pip --version >/dev/null 2>&1
}

# Debian's Python comes without ensurepip, which `venv` wants; then pip puts itself in.
make_venv() {
  local base="$1" log
  log="$(mktemp)"
  if "$base" -m venv --clear "$venv" >"$log" 2>&1 && venv_works; then
    :
  elif "$base" -m venv --clear --without-pip "$venv" >>"$log" 2>&1 \
    && "$base" -m pip --python "$python" install --quiet pip >>"$log" 2>&1 \
    && venv_works; then
    :
  elif "$base" -m virtualenv --clear "$venv" >>"$log" 2>&1 && venv_works; then
    :
  else
    cat "$log" >&2
    rm -f "$log"
    die "$base made no virtual environment: install its venv (Debian: apt-get install" \
      "python3-venv) or virtualenv (pip install virtualenv), or say VLP_PYTHON=…"
  fi
  rm -f "$log"
}

# The extra that the machine's hardware wants; nothing for a CPU.
accelerator() {
  case "${VLP_JAX_ACCELERATOR:-}" in
    cpu) return ;;
    cuda | tpu) printf '%s\n' "$VLP_JAX_ACCELERATOR"; return ;;
    "") ;;
    *) die "VLP_JAX_ACCELERATOR=$VLP_JAX_ACCELERATOR: say cpu, cuda or tpu." ;;
  esac
  local gpus
  gpus="$(nvidia-smi -L 2>/dev/null || true)"
  if [ "$(uname -s)" = Linux ] && [ "${gpus#GPU }" != "$gpus" ]; then
    echo cuda
  elif has_tpu; then
    echo tpu
  fi
}

# /dev/accel0 is a TPU, while /dev/accel/accel0 is someone else's. Newer TPUs are behind
# vfio, and known by Google's vendor number, which its disks (class 01) and network cards
# (02) have too.
has_tpu() {
  compgen -G '/dev/accel[0-9]*' >/dev/null && return 0
  [ -n "${TPU_WORKER_ID:-}" ] && return 0
  compgen -G '/dev/vfio/[0-9]*' >/dev/null || return 1
  local device class
  for device in /sys/bus/pci/devices/*; do
    [ "$(cat "$device/vendor" 2>/dev/null)" = 0x1ae0 ] || continue
    class="$(cat "$device/class" 2>/dev/null)"
    case "$class" in "" | 0x01* | 0x02*) ;; *) return 0 ;; esac
  done
  return 1
}

# What an installation depends on: another clone, other requirements, another Python.
fingerprint() {
  "$python" - "$root" "$1" <<'PYTHON'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
parts = [sys.version, str(root), sys.argv[2]]
parts += [(root / name).read_text() for name in ("setup.cfg", "pyproject.toml")]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())
PYTHON
}

prepare() {
  local base extra extras stamp print
  if ! venv_works; then
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
      die "$venv is there and is no virtual environment: say another VLP_JAX_VENV."
    fi
    base="$(find_python)" || exit 1
    say "making a virtual environment in $venv with $("$base" --version)"
    make_venv "$base"
  fi
  extras="$(accelerator)" || exit 1
  for extra in "$@"; do extras="$extras${extras:+,}$extra"; done
  stamp="$venv/vlp_jax-${extras:-cpu}.stamp"
  print="$(fingerprint "$extras")"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$print" ]; then
    return
  fi
  say "installing vlp_jax${extras:+[$extras]} into it: once, a few minutes"
  rm -f "$stamp"
  "$python" -m pip install --quiet --disable-pip-version-check \
    --editable "$root${extras:+[$extras]}" \
    || die "the installation failed, see above; the same command tries again."
  printf '%s\n' "$print" >"$stamp"
}
