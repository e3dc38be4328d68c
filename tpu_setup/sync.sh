#!/usr/bin/env bash
# Sends the code to all workers of a TPU.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<EOF
Usage: sync.sh --name NAME --project PROJECT --zone ZONE [flags]

Sends the files that git tracks, including uncommitted edits, to ~/grpo-jax/code on every
worker. ~/grpo-jax/code/REVISION has their revision. Refused while a run is alive.

$(common_usage)
EOF
}

script_flag() { TAKEN=0; }

load_env
parse_flags "$@"
refuse_command
validate_common
send_code ""
remote all unpack
