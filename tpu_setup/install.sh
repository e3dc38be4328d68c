#!/usr/bin/env bash
# Installs Python 3.12, JAX for TPU and this project on all workers, and checks the chips.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<EOF
Usage: install.sh --name NAME --project PROJECT --zone ZONE [--type TYPE] [flags]

Sends the code to every worker, creates a Python 3.12 environment with uv, and installs the
project with its extras. Then runs check_devices.py on all workers together. With --type it
also checks the numbers of devices and processes. Safe to repeat.

  --extras LIST    extras of the project, comma separated; default tpu,hub
  --bucket gs://.. also check that every worker can write there (BUCKET)
  --no-check       install only
  --archive FILE   send this code instead of the working tree (for babysit.sh)

$(common_usage)
EOF
}

script_flag() {
  TAKEN=2
  case $1 in
    --extras) need_value "$@" && extras=$2 ;;
    --bucket) need_value "$@" && BUCKET=$2 ;;
    --archive) need_value "$@" && archive=$2 ;;
    --no-check) TAKEN=1 && check=0 ;;
    *) TAKEN=0 ;;
  esac
}

# v4 and v5p count TensorCores, two to a chip, and JAX shows one device per chip. Hosts
# carry 4 chips, except the single-host v5e and v6e types, which carry all of theirs.
expected_counts() {
  local count=${ACCELERATOR_TYPE#*-} chips hosts
  chips=$count
  case $ACCELERATOR_TYPE in v4-* | v5p-*) chips=$((count / 2)) ;; esac
  hosts=$(((chips + 3) / 4))
  case $ACCELERATOR_TYPE in v5litepod-8 | v6e-8) hosts=1 ;; esac
  checks+=(--devices "$chips" --processes "$hosts")
}

load_env
extras=tpu,hub
archive=
check=1
BUCKET=${BUCKET:-}
checks=(--platform tpu --distributed)
parse_flags "$@"
refuse_command
validate_common
matches "extras" "$extras" '^[a-z]+(,[a-z]+)*$' "expected a list such as tpu,hub"
[[ -z $archive ]] || check_archive "$archive"
[[ -z ${ACCELERATOR_TYPE:-} ]] || expected_counts
if [[ -n $BUCKET ]]; then
  matches "bucket" "$BUCKET" '^gs://[a-z0-9][-a-z0-9_.]{1,220}[a-z0-9](/[A-Za-z0-9_./=-]*)?$' \
    "expected gs://bucket or gs://bucket/folder"
  checks+=(--bucket "$BUCKET")
fi

send_code "$archive"
remote all install "$extras"
((!check)) || remote all check "${checks[@]}"
