#!/usr/bin/env bash
# Shows the state of a TPU and of the run on its workers, and fetches the logs.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
source "$HERE/states.sh"

usage() {
  cat <<EOF
Usage: status.sh --name NAME --project PROJECT --zone ZONE [flags]

Prints the states of the queued resource and of the node. Then prints one line per worker:
state of the run (idle, running, finished, failed, interrupted, stopped), exit code, revision.

  --lines N        also print the last N lines of every worker's log
  --follow         then follow the log of worker 0 until Ctrl-C
  --collect DIR    copy the complete log of every worker to DIR/worker-N.log

$(common_usage)
EOF
}

script_flag() {
  TAKEN=2
  case $1 in
    --lines) need_value "$@" && lines=$2 ;;
    --collect) need_value "$@" && folder=$2 ;;
    --follow) TAKEN=1 && follow=1 ;;
    *) TAKEN=0 ;;
  esac
}

collect() { # one copy per worker: scp from a TPU takes a single worker
  local workers worker
  workers=$(describe tpu-vm 'value(networkEndpoints.len())')
  ((DRY_RUN)) || mkdir -p -- "$folder"
  for ((worker = 0; worker < ${workers:-1}; worker++)); do
    cloud compute tpus tpu-vm scp "$TPU_NAME:grpo-jax/logs/latest.log" \
      "$folder/worker-$worker.log" "${WHERE[@]}" --worker="$worker" --quiet </dev/null
  done
}

load_env
lines=
folder=
follow=0
parse_flags "$@"
refuse_command
validate_common
[[ -z $lines ]] || whole_number "lines" "$lines"
[[ $folder != -* ]] || usage_error "--collect needs a folder"

queued=$(queue_state)
node=$(node_state)
((DRY_RUN)) || printf 'queued resource %s: %s\nnode %s: %s\n' \
  "$TPU_NAME" "${queued:-absent}" "$TPU_NAME" "${node:-absent}"
if ! ((DRY_RUN)) && [[ $node != READY && $node != ACTIVE ]]; then
  exit 0 # no worker to ask
fi
remote all state
[[ -z $lines ]] || remote all log "$lines"
[[ -z $folder ]] || collect
((!follow)) || remote 0 log follow
