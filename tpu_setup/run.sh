#!/usr/bin/env bash
# Starts the same command on all workers of a TPU, detached, or stops it.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<EOF
Usage: run.sh --name NAME --project PROJECT --zone ZONE [flags] [-- COMMAND...]
       run.sh --name NAME --project PROJECT --zone ZONE --stop

Sends the code and starts COMMAND (default: grpo-jax train) on every worker, in the folder
of the code. The command continues when the connection ends; status.sh shows its state and
logs. If the command ends within 10 seconds, run.sh shows the end of its log and returns its
exit code. Each log starts with the command and the exact revision. If the same command is
already running, nothing happens; another command is refused until --stop. To resume a
training run, start the same command again.

  --stop           send SIGTERM (a training run saves, then ends), after 300 s SIGKILL
  --no-sync        use the code that is already on the workers
  --archive FILE   send this code instead of the working tree (for babysit.sh)

$(common_usage)
EOF
}

script_flag() {
  TAKEN=1
  case $1 in
    --stop) stop=1 ;;
    --no-sync) sync=0 ;;
    --archive) need_value "$@" && TAKEN=2 && archive=$2 ;;
    *) TAKEN=0 ;;
  esac
}

load_env
stop=0
sync=1
archive=
parse_flags "$@"
validate_common
[[ -z $archive ]] || check_archive "$archive"
if ((stop)); then
  refuse_command
  remote all stop
  exit
fi
((${#COMMAND[@]} > 0)) || COMMAND=(grpo-jax train)
[[ ${COMMAND[0]} != -* ]] || usage_error "after -- comes a whole command: -- grpo-jax train ${COMMAND[0]} ..."
[[ -n $archive ]] || ((!sync)) || refuse_files_not_sent
((!sync)) || send_code "$archive"
remote all start "${COMMAND[@]}"
