#!/usr/bin/env bash
# Deletes a TPU and its queued resource.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
source "$HERE/states.sh"

usage() {
  cat <<EOF
Usage: delete.sh --name NAME --project PROJECT --zone ZONE [--yes]

Deletes the TPU, its disk and its queued resource in any state. Buckets are kept. Asks
first. Safe to repeat.

  --yes    do not ask

$(common_usage)
EOF
}

script_flag() {
  TAKEN=1
  case $1 in
    --yes) yes=1 ;;
    *) TAKEN=0 ;;
  esac
}

confirm() {
  local answer=
  ((yes || DRY_RUN)) && return
  printf 'Delete %s in %s of %s, with its disk? [y/N] ' "$TPU_NAME" "$ZONE" "$PROJECT" >&2
  read -r answer || true # the end of the input means no
  [[ $answer == [yY] || $answer == [yY][eE][sS] ]] || fail 1 "nothing deleted"
}

load_env
yes=0
parse_flags "$@"
refuse_command
validate_common

queued=$(queue_state)
node=$(node_state)
if ((DRY_RUN)); then
  remove_resource queued
  remove_resource direct
elif [[ -n $queued ]]; then
  confirm
  remove_resource queued
elif [[ -n $node ]]; then
  confirm
  remove_resource direct
else
  note "there is no $TPU_NAME in $ZONE of $PROJECT"
fi
