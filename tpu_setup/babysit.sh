#!/usr/bin/env bash
# Keeps a command running on a TPU until it finishes, across preemptions and crashes.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
source "$HERE/states.sh"

usage() {
  cat <<EOF
Usage: babysit.sh --name NAME --project PROJECT --zone ZONE --type TYPE [flags] [-- COMMAND...]

Creates the TPU, installs, starts COMMAND (default: grpo-jax train) and watches it. After a
preemption or a crash it waits, creates the TPU again if needed, and starts the same command
with the same code. So a run with its folder in a bucket resumes. Exit codes: 0 when the
command has finished on every worker, 1 when no retries are left, 3 when the run was stopped
by hand. A command that is refused at its first start (exit code 2: wrong usage; 126 and 127:
not found) is not repeated. Run this script where it can keep running: in tmux, or on a
small VM.

  --spot | --on-demand, --queued | --direct, --runtime VERSION    as in create.sh
  --max-retries N          restarts without a healthy period between them; default 10
  --healthy-after SECONDS  a run of this length resets the count; default 1800
  --backoff SECONDS        first pause, doubled up to 600; default 30
  --poll SECONDS           pause between checks; default 60

$(common_usage)
EOF
}

script_flag() {
  TAKEN=2
  case $1 in
    --spot | --on-demand | --queued | --direct) TAKEN=1 && create_flags+=("$1") ;;
    --runtime) need_value "$@" && create_flags+=(--runtime "$2") ;;
    --max-retries) need_value "$@" && max_retries=$2 ;;
    --healthy-after) need_value "$@" && healthy_after=$2 ;;
    --backoff) need_value "$@" && backoff=$2 ;;
    --poll) need_value "$@" && poll=$2 ;;
    *) TAKEN=0 ;;
  esac
  case $1 in --queued | --direct) REQUEST=${1#--} ;; esac
}

# Makes the TPU ready and starts the command; adopts a TPU and a run that are already up.
# Sets `started` when it gets as far as the command.
bring_up() {
  local verdict=absent
  "$HERE/create.sh" "${common[@]}" "${create_flags[@]}" || return
  ((DRY_RUN)) || verdict=$(run_verdict)
  case $verdict in
    absent | unreachable)
      "$HERE/install.sh" "${common[@]}" ${archive_flags[@]+"${archive_flags[@]}"} --no-check || return
      ;;
    mixed | refused) # the workers of one run only work together
      "$HERE/run.sh" "${common[@]}" --stop || return
      ;;
  esac
  started=$SECONDS
  start_command
}

# Its exit code is that of a command that ended at once: 4 has another meaning here.
start_command() {
  local rc=0
  "$HERE/run.sh" "${common[@]}" ${archive_flags[@]+"${archive_flags[@]}"} -- "${COMMAND[@]}" || rc=$?
  return "$((rc == 4 ? 1 : rc))"
}

# Looks at the run until something ends it; sets `outcome`.
watch_run() {
  local state unreachable=0
  while :; do
    sleep "$poll"
    state=$(resource_state "$REQUEST") || state=UNKNOWN
    case $state in
      LOST | ABSENT | LEAVING | OFF) outcome=preempted && return ;;
      READY) outcome=$(run_verdict) ;;
      *) outcome=unreachable ;; # repaired or restarted by the platform
    esac
    case $outcome in
      running) unreachable=0 ;;
      unreachable) ((++unreachable < 5)) || return 0 ;;
      *) return 0 ;;
    esac
  done
}

again_or_fail() { # counts a failure and pauses, or gives up
  failures=$((failures + 1))
  ((failures <= max_retries)) || fail 1 "gave up after $max_retries retries; last: $1"
  note "$1: retry $failures of $max_retries in $pause s"
  sleep "$pause"
  pause=$((pause * 2 < 600 ? pause * 2 : 600))
}

give_up_refused() { # give_up_refused EXIT_CODE; other workers may wait for the one that refused
  "$HERE/run.sh" "${common[@]}" --stop || true
  fail "$1" "the command was refused: status.sh --lines 20"
}

# A command that is refused the first time will be the next time too. Later it may want
# for something that passes, such as a connection.
babysit() {
  local failures=0 pause=$backoff outcome started rc first=1
  while :; do
    rc=0 started=
    bring_up || rc=$?
    case $rc in
      0) watch_run ;;
      3) exit 3 ;;
      4) continue ;; # still in the queue
      *)
        outcome="could not start"
        if ((first)) && refused "$rc"; then
          # Without a start, a script above refused what it was given.
          [[ -n $started ]] || exit "$rc"
          give_up_refused "$rc"
        fi
        ;;
    esac
    case $outcome in
      finished) note "finished on every worker" && return ;;
      stopped) fail 3 "the run was stopped by hand" ;;
      refused) ((!first)) || give_up_refused 2 ;;
    esac
    ((rc)) || first=0
    # A command may end before its start is reported, so both ways count as a run.
    if [[ -n $started ]] && ((SECONDS - started >= healthy_after)); then
      failures=0
      pause=$backoff
    fi
    ((rc)) || outcome="the run was $outcome"
    again_or_fail "$outcome"
  done
}

load_env
REQUEST=${REQUEST:-queued}
max_retries=10
healthy_after=1800
backoff=30
poll=60
create_flags=()
archive_flags=()
parse_flags "$@"
validate_common
[[ -n ${ACCELERATOR_TYPE:-} ]] || usage_error "no type: give --type or set ACCELERATOR_TYPE"
whole_number "max-retries" "$max_retries"
whole_number "healthy-after" "$healthy_after"
whole_number "backoff" "$backoff"
whole_number "poll" "$poll"
create_flags+=(--"$REQUEST" --poll "$((poll < 30 ? poll : 30))")
common=(--name "$TPU_NAME" --project "$PROJECT" --zone "$ZONE" --type "$ACCELERATOR_TYPE")
((${#COMMAND[@]} > 0)) || COMMAND=(grpo-jax train)
if ((DRY_RUN)); then
  common+=(--dry-run)
  bring_up
else
  refuse_files_not_sent
  # Packed once: a restart days later runs the code this run began with.
  pack_code "$SCRATCH/$ARCHIVE_NAME"
  archive_flags=(--archive "$SCRATCH/$ARCHIVE_NAME")
  babysit
fi
