#!/usr/bin/env bash
# A stand-in for gcloud: logs its arguments, serves states from files, runs ssh right here.
#
# The folder FAKE_CLOUD holds `log` (words end in \x1f, calls in \x1e), `queue` and `node`
# (states, one line served per describe, the last one stays; "-" means not found),
# `create_N` and `node_N` (the states after the N-th create) and one home per worker.
set -euo pipefail
caller=$PWD
cd "$FAKE_CLOUD"
printf '%s\x1f' "$@" >>log
printf '\x1e' >>log
case $1 in
  compute) ;;
  projects) echo 123 && exit ;; # describe: the project's number
  *) exit ;;
esac
kind=$3 verb=$4
shift 4
words=()
for word; do
  case $word in
    --command=*) command=${word#*=} ;;
    --format=*) format=${word#*=} ;;
    --worker=all) homes=(worker-*) ;;
    --worker=*) homes=("worker-${word#*=}") ;;
    --*) ;;
    *) words+=("$word") ;;
  esac
done

describe() {
  local file=queue states
  [[ ! -e outage ]] || { echo "ERROR: UNAUTHENTICATED: no credentials" >&2 && exit 1; }
  if [[ $format == *'len()'* ]]; then
    homes=(worker-*)
    echo "${#homes[@]}"
    return
  fi
  [[ $kind == queued-resources ]] || file=node
  mapfile -t states <$file
  ((${#states[@]} == 1)) || printf '%s\n' "${states[@]:1}" >$file
  [[ ${states[0]} != - ]] || { echo "ERROR: NOT_FOUND: Resource was not found" >&2 && exit 1; }
  echo "${states[0]}"
}

create() {
  echo x >>creates
  local count
  count=$(wc -l <creates)
  cat "create_$count" >queue 2>/dev/null || echo ACTIVE >queue
  cat "node_$count" >node 2>/dev/null || echo READY >node
}

delete() { # kills what runs on the workers and empties their disks
  local home
  for home in worker-*; do
    [[ ! -e $home/grpo-jax/run/pid ]] || kill -KILL -- "-$(<"$home/grpo-jax/run/pid")" || true
    rm -rf "$home"
    mkdir "$home"
  done
  echo - | tee queue >node
}

run_over_ssh() {
  local home code=0 job jobs=()
  for home in "${homes[@]}"; do
    (cd "$home" && HOME=$PWD exec bash -c "$command" </dev/null) &
    jobs+=("$!")
  done
  for job in "${jobs[@]}"; do
    wait "$job" || code=$?
  done
  exit "$code"
}

copy() {
  local home target=${words[-1]}
  for home in "${homes[@]}"; do
    if [[ $target == *:* ]]; then
      cp "${words[@]:0:${#words[@]}-1}" "$home/${target#*:}"
    else
      (file=$PWD/$home/${words[0]#*:} && cd "$caller" && cp "$file" "$target")
    fi
  done
}

case $verb in
  describe) describe ;;
  create) create ;;
  delete) delete ;;
  ssh) run_over_ssh ;;
  scp) copy ;;
  list) ;;
  *) exit 2 ;;
esac
