#!/usr/bin/env bash
# Runs on a worker of a TPU: unpacks the code, installs, and starts, stops and reports the
# one run of this machine. The other scripts send it along and call it over ssh.
#
# ~/grpo-jax/: code (what was sent; current folder of the run), venv, logs, cache (compiled
# programs), run (lock, pid, command, rc, files of the code). A run is alive while anything
# it started holds the lock, so leftovers count and a pid reused after a reboot does not.
set -euo pipefail
export LC_ALL=C
umask 077 # whoever can write the compilation cache can run code here

BASE=$HOME/grpo-jax
RUN=$BASE/run
ARCHIVE=$HOME/grpo-jax-code.tar.gz
SELF=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")
GRACE=300 # seconds that a stopped run has for its last checkpoint
WATCH=${GRPO_JAX_WATCH:-10} # seconds for which a start is watched

say() { printf '[%s] %s\n' "$(hostname)" "$*"; }

fail() { # fail CODE MESSAGE
  say "$2" >&2
  exit "$1"
}

# Shared, so that two checks at once do not take each other for a run.
alive() { ! (exec 9>>"$RUN/lock" && flock --shared --nonblock 9); }

read_file() { [[ ! -f $1 ]] || cat "$1"; }

refuse_while_alive() {
  ! alive || fail 1 "a run is alive here ($(read_file "$RUN/command")); run.sh --stop ends it"
}

# Replaces the files that the last code brought; what a run wrote beside them stays.
# Nothing is done when nothing was sent.
unpack() {
  [[ -f $ARCHIVE ]] || return 0
  if [[ -f $RUN/files ]]; then
    (cd "$BASE/code" && xargs -0 rm -f -- <"$RUN/files")
  else
    rm -rf "$BASE/code"
  fi
  tar -tzf "$ARCHIVE" --quoting-style=literal | grep -v '/$' | tr '\n' '\0' >"$RUN/files"
  mkdir -p "$BASE/code"
  tar -xzf "$ARCHIVE" -C "$BASE/code"
  rm -f "$ARCHIVE"
}

cmd_unpack() {
  refuse_while_alive
  unpack
  say "code at revision $(read_file "$BASE/code/REVISION")"
}

find_uv() {
  if ! command -v uv; then
    # Newer system Pythons refuse user installs without this; older pips ignore it.
    [[ -x $HOME/.local/bin/uv ]] || PIP_BREAK_SYSTEM_PACKAGES=1 \
      python3 -m pip install --user --quiet --upgrade uv >&2
    printf '%s\n' "$HOME/.local/bin/uv"
  fi
}

# The system Python of the TPU images is too old: pip would silently choose an old JAX.
cmd_install() { # install EXTRAS
  local uv
  refuse_while_alive
  unpack
  [[ -d $BASE/code ]] || fail 1 "no code here; sync.sh sends it"
  uv=$(find_uv)
  [[ -x $BASE/venv/bin/python ]] || "$uv" venv --quiet --python 3.12 "$BASE/venv"
  "$uv" pip install --quiet --python "$BASE/venv/bin/python" --editable "$BASE/code[$1]"
  touch "$BASE/installed"
  say "installed revision $(read_file "$BASE/code/REVISION")"
}

activate() { # with both platforms named, JAX fails where it finds no TPU: no CPU fallback
  export PATH="$BASE/venv/bin:$PATH" VIRTUAL_ENV="$BASE/venv" PYTHONUNBUFFERED=1
  export JAX_PLATFORMS="${JAX_PLATFORMS:-tpu,cpu}"
  export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$BASE/cache}"
  cd "$BASE/code"
}

cmd_check() { # check ARGUMENT...: arguments of check_devices.py
  refuse_while_alive
  activate
  python "$BASE/code/tpu_setup/check_devices.py" "$@"
}

cmd_start() { # start COMMAND...
  local line log
  printf -v line '%q ' "$@"
  exec 9>>"$RUN/lock"
  # It waits because a check of the state holds the lock for an instant.
  if ! flock --timeout 1 9; then
    [[ $(read_file "$RUN/command") == "$line" ]] ||
      fail 3 "another run is alive here: $(read_file "$RUN/command"); run.sh --stop ends it"
    say "already running: $line"
    return
  fi
  [[ -f $BASE/installed ]] || fail 1 "nothing is installed here; install.sh does it"
  unpack
  rm -f "$RUN/rc" "$RUN/stopped" "$RUN/terminated"
  printf '%s\n' "$line" >"$RUN/command"
  log=$(date -u +%Y%m%dT%H%M%SZ).log
  # The child inherits the lock with descriptor 9.
  setsid nohup bash "$SELF" supervise "$@" </dev/null >>"$BASE/logs/$log" 2>&1 &
  echo "$!" >"$RUN/pid"
  ln -sfn "$log" "$BASE/logs/latest.log"
  exec 9>&- # or this process would look like the run
  say "started revision $(read_file "$BASE/code/REVISION"), log ~/grpo-jax/logs/$log"
  watch_start
}

# Most mistakes in a command end it at once: the caller gets its exit code and its words.
watch_start() {
  local waited=0 rc
  while alive; do
    ((waited++ < WATCH * 5)) || return 0
    sleep 0.2
  done
  rc=$(read_file "$RUN/rc")
  [[ $rc != 0 ]] || return 0
  cmd_log 20 >&2
  fail "${rc:-1}" "the command ended at once, exit code ${rc:-unknown}"
}

cmd_supervise() { # supervise COMMAND...: called by start only
  local rc=0
  trap 'touch "$RUN/terminated"' TERM # bash waits for the command, then runs this
  say "command: $(read_file "$RUN/command")"
  say "revision: $(read_file "$BASE/code/REVISION")"
  say "started: $(date -u +%Y-%m-%dT%H:%M:%SZ)"
  activate
  "$@" || rc=$?
  say "ended: $(date -u +%Y-%m-%dT%H:%M:%SZ), exit code $rc"
  echo "$rc" >"$RUN/rc.new"
  mv "$RUN/rc.new" "$RUN/rc"
}

cmd_stop() {
  local group waited=0
  group=$(read_file "$RUN/pid")
  if ! alive || [[ -z $group ]]; then
    say "nothing is running"
    return
  fi
  touch "$RUN/stopped"
  kill -TERM -- "-$group" || true # it may have just ended
  while alive; do
    ((waited++ < GRACE * 5)) || break
    sleep 0.2
  done
  if alive; then
    kill -KILL -- "-$group" || true
    fail 1 "killed after $GRACE s without an end"
  fi
  say "stopped"
}

# Sets `state` and `rc`. The lock is tried before the exit code is read: a run that ends
# between the two has then left its code, and never looks like one that was cut off.
run_state() {
  local running=0
  ! alive || running=1
  rc=$(read_file "$RUN/rc")
  if [[ ! -f $BASE/installed ]]; then
    state=absent
  elif [[ ! -f $RUN/command ]]; then
    state=idle
  elif [[ -z $rc ]] && ((running)); then
    state=running
  elif [[ -f $RUN/stopped ]]; then
    state=stopped
  elif [[ -z $rc || -f $RUN/terminated ]]; then
    state=interrupted # a reboot, a kill, or a save on SIGTERM
  elif [[ $rc == 0 ]]; then
    state=finished
  else
    state=failed
  fi
}

cmd_state() {
  local state rc revision
  run_state
  revision=$(read_file "$BASE/code/REVISION")
  printf 'grpo-jax-state host=%s state=%s rc=%s revision=%s command=%s\n' "$(hostname)" \
    "$state" "${rc:--}" "${revision:--}" "$(read_file "$RUN/command")"
}

cmd_log() { # log LINES|follow
  local log=$BASE/logs/latest.log
  [[ -f $log ]] || fail 1 "no log yet"
  if [[ $1 == follow ]]; then
    exec tail -n 20 -F "$log"
  fi
  tail -n "$1" "$log" | sed "s/^/[$(hostname)] /"
}

main() {
  local verb=$1
  shift
  mkdir -p "$RUN" "$BASE/logs" "$BASE/cache"
  case $verb in
    unpack) cmd_unpack ;;
    install) cmd_install "$@" ;;
    check) cmd_check "$@" ;;
    start) cmd_start "$@" ;;
    supervise) cmd_supervise "$@" ;;
    stop) cmd_stop ;;
    state) cmd_state ;;
    log) cmd_log "$@" ;;
    *) fail 2 "unknown verb $verb" ;;
  esac
}

# On one line: a newer copy may replace this file while a run is supervised from it.
main "$@"; exit
