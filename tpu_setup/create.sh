#!/usr/bin/env bash
# Creates a TPU, or adopts the one that exists, and waits until it is ready.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
source "$HERE/states.sh"

usage() {
  cat <<EOF
Usage: create.sh --name NAME --project PROJECT --zone ZONE --type TYPE [flags]

Creates a TPU and waits until it is ready. Safe to repeat: it adopts an active TPU, waits
for a queued request, and deletes and repeats a suspended or failed request.

  --spot | --on-demand   capacity (CAPACITY); default on-demand
  --queued | --direct    queued resource, or create immediately and fail if there is no
                         capacity (REQUEST); default queued
  --runtime VERSION      TPU software version (RUNTIME_VERSION); default: by type
  --valid-until TIME     give up the queued request after this time, such as 6h
  --timeout SECONDS      stop waiting, but keep the request; default 21600
  --poll SECONDS         longest pause between checks; default 30

$(common_usage)
EOF
}

script_flag() {
  TAKEN=2
  case $1 in
    --spot | --on-demand) TAKEN=1 && CAPACITY=${1#--} ;;
    --queued | --direct) TAKEN=1 && REQUEST=${1#--} ;;
    --runtime) need_value "$@" && RUNTIME_VERSION=$2 ;;
    --valid-until) need_value "$@" && valid_until=$2 ;;
    --timeout) need_value "$@" && timeout=$2 ;;
    --poll) need_value "$@" && poll=$2 ;;
    *) TAKEN=0 ;;
  esac
}

default_runtime() { # https://cloud.google.com/tpu/docs/runtimes
  case $ACCELERATOR_TYPE in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
  esac
}

validate() {
  refuse_command
  validate_common
  [[ -n ${ACCELERATOR_TYPE:-} ]] || usage_error "no type: give --type or set ACCELERATOR_TYPE"
  [[ -n ${RUNTIME_VERSION:-} ]] || RUNTIME_VERSION=$(default_runtime)
  matches "runtime" "$RUNTIME_VERSION" '^[a-z0-9][-a-z0-9.]{0,62}$' "expected a name such as v2-alpha-tpuv6e"
  matches "capacity" "$CAPACITY" '^(spot|on-demand)$' "expected spot or on-demand"
  matches "request" "$REQUEST" '^(queued|direct)$' "expected queued or direct"
  [[ -z $valid_until ]] || matches "duration" "$valid_until" '^[1-9][0-9]{0,4}[smhd]$' "expected 6h, 90m, 2d"
  whole_number "timeout" "$timeout"
  whole_number "poll" "$poll"
}

request() {
  local flags=("${WHERE[@]}" --accelerator-type="$ACCELERATOR_TYPE")
  [[ $CAPACITY == on-demand ]] || flags+=(--spot)
  if [[ $REQUEST == direct ]]; then
    cloud compute tpus tpu-vm create "$TPU_NAME" "${flags[@]}" --version="$RUNTIME_VERSION" --quiet
    return
  fi
  [[ -z $valid_until ]] || flags+=(--valid-until-duration="$valid_until")
  cloud compute tpus queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" "${flags[@]}" \
    --runtime-version="$RUNTIME_VERSION" --async --quiet
}

bring_up() {
  local state requested=0 pause=$((poll < 2 ? poll : 2)) deadline=$((SECONDS + timeout))
  while :; do
    state=$(resource_state "$REQUEST")
    case $state in
      READY) note "$TPU_NAME is ready" && return ;;
      OFF) fail 1 "$TPU_NAME is stopped; start it (gcloud compute tpus tpu-vm start) or delete it" ;;
      ABSENT)
        if ((!requested)); then
          note "requesting $TPU_NAME ($ACCELERATOR_TYPE, $CAPACITY)"
          request || fail 1 "the request was refused; 'Quota and capacity' in tpu_setup/README.md may help"
          requested=1
        fi
        ;;
      LOST)
        # A request of ours that failed at once (quota, permissions) would fail again.
        ((!requested)) || fail 1 "$TPU_NAME was requested and failed at once; status.sh shows its state"
        note "$TPU_NAME was preempted or has failed: deleting it to request it again"
        remove_resource "$REQUEST" || fail 1 "could not delete $TPU_NAME"
        continue
        ;;
    esac
    ((SECONDS < deadline)) || fail 4 "$TPU_NAME is still $state; the same command goes on waiting"
    sleep "$pause"
    pause=$((pause * 2 < poll ? pause * 2 : poll))
  done
}

load_env
CAPACITY=${CAPACITY:-on-demand}
REQUEST=${REQUEST:-queued}
valid_until=
timeout=21600
poll=30
parse_flags "$@"
validate
if ((DRY_RUN)); then
  resource_state "$REQUEST" >/dev/null
  request
else
  bring_up
fi
