# shellcheck shell=bash
# What the launchers share: help from their first lines, and commands that --dry-run
# only prints. They source it after env.sh.

dry_run="" # not empty: print, and do nothing

# The comment at the head of a script, as its help.
show_help() { sed -n '2,/^set /{s/^# \{0,1\}//;/^set /!p;}' "$1"; }

# One command as a line that a shell would read the same.
quoted() {
  local word line=""
  for word in "$@"; do
    # What %q would break into backslashes reads better in quotes.
    case "$word" in
      "" | *[!A-Za-z0-9_./:=,@%+~-]*) word="'${word//\'/\'\\\'\'}'" ;;
    esac
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Runs a command, or prints it.
run() {
  if [ -n "$dry_run" ]; then quoted "$@"; else "$@"; fi
}

# need OPTION VALUE [HINT]: an option that has to be given.
need() {
  [ -n "$2" ] || die "$1 is missing${3:+: $3}. See --help."
}

# number OPTION VALUE: a whole number of 1 or more, or 0 where $3 says so.
number() {
  case "$2" in
    "" | *[!0-9]*) die "$1=$2: want a whole number." ;;
  esac
  [ "$2" -ge "${3:-1}" ] || die "$1=$2: want ${3:-1} or more."
}

# Files and folders of a command that are to be there: config, up to its argument.
config_is_there() {
  [ -f "${1%%:*}" ] || die "--config=$1: there is no ${1%%:*} in $PWD."
}
