# shellcheck shell=bash
# What is known about a TPU: its queued resource, its node, and the runs on its workers.
# Sourced after lib.sh.

describe() { # describe KIND FORMAT: prints the value, nothing when there is no such resource
  if ((DRY_RUN)); then
    cloud compute tpus "$1" describe "$TPU_NAME" "${WHERE[@]}" --format="$2"
  elif ! gcloud compute tpus "$1" describe "$TPU_NAME" "${WHERE[@]}" --format="$2" \
    2>"$SCRATCH/describe" 3>&-; then
    # Any other error (credentials, network, API off) must not read as "does not exist".
    [[ ! -s $SCRATCH/describe ]] || grep -qiE 'not[ _]found' "$SCRATCH/describe" ||
      fail 1 "cannot describe $TPU_NAME: $(tail -n 3 "$SCRATCH/describe")"
  fi
}

queue_state() { describe queued-resources 'value(state.state)'; }
node_state() { describe tpu-vm 'value(state)'; }

# Prints ABSENT, WAITING, READY, LOST (delete it and ask again), LEAVING or OFF.
resource_state() { # resource_state queued|direct
  local state
  if [[ $1 == queued ]]; then
    state=$(queue_state) || return # -e is off inside $(...)
    case $state in
      ACTIVE) ;; # the request is served; the node decides
      '') echo ABSENT && return ;;
      SUSPENDED | FAILED) echo LOST && return ;;
      SUSPENDING | DELETING) echo LEAVING && return ;;
      *) echo WAITING && return ;;
    esac
  fi
  state=$(node_state) || return
  case $state in
    READY | ACTIVE) echo READY ;;
    PREEMPTED | TERMINATED) echo LOST ;;
    DELETING | STOPPING | HIDING) echo LEAVING ;;
    STOPPED | HIDDEN) echo OFF ;;
    # An ACTIVE request has its node; if it cannot be seen, the next command will say why.
    '') [[ $1 == queued ]] && echo READY || echo ABSENT ;;
    *) echo WAITING ;;
  esac
}

refused() { [[ $1 == 2 || $1 == 126 || $1 == 127 ]]; } # refused EXIT_CODE: wrong usage, or not found

# Prints one word for the runs of all workers together: running, finished, stopped,
# interrupted, failed, refused (one failed, and would again), mixed (some run, some do
# not), idle, absent (nothing installed) or unreachable.
run_verdict() {
  local lines states
  if ! lines=$(remote all state 2>"$SCRATCH/state"); then
    # A worker without the script has never been set up.
    if grep -q "$WORKER_SCRIPT: No such file" "$SCRATCH/state"; then
      echo absent
    else
      echo unreachable
    fi
    return
  fi
  states=" $(sed -n 's/^grpo-jax-state host=[^ ]* state=\([a-z]*\) .*/\1/p' <<<"$lines" |
    sort -u | tr '\n' ' ')"
  # The workers of one run only work together: one that is refused is enough.
  if grep -qE '^grpo-jax-state .* state=failed rc=(2|126|127) ' <<<"$lines"; then
    echo refused
    return
  fi
  case $states in
    ' ') echo unreachable ;;
    *absent*) echo absent ;;
    ' finished running ') echo running ;; # workers end within seconds of each other
    *running*) [[ $states == ' running ' ]] && echo running || echo mixed ;;
    *failed*) echo failed ;;
    *interrupted*) echo interrupted ;;
    *stopped*) echo stopped ;;
    *idle*) echo idle ;;
    *) echo finished ;;
  esac
}

remove_resource() { # remove_resource queued|direct; --force deletes the node as well
  if [[ $1 == queued ]]; then
    cloud compute tpus queued-resources delete "$TPU_NAME" "${WHERE[@]}" --force --quiet
  else
    cloud compute tpus tpu-vm delete "$TPU_NAME" "${WHERE[@]}" --quiet
  fi
}
