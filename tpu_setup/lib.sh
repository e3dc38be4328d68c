# shellcheck shell=bash
# Common parts of the scripts in this folder: flags, validation, the one place that
# calls gcloud, and the states of a TPU. Sourced, never run.
#
# Exit codes everywhere: 0 done, 1 failed, 2 wrong usage (nothing was executed),
# 3 another command is running there, 4 still waiting for capacity.

set -euo pipefail
export LC_ALL=C # [a-z] in the patterns below means ASCII
exec 3>&1       # dry-run lines reach the terminal from inside $(...) too

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT

readonly SETTINGS="TPU_NAME PROJECT ZONE ACCELERATOR_TYPE RUNTIME_VERSION CAPACITY REQUEST BUCKET"
readonly ARCHIVE_NAME=grpo-jax-code.tar.gz
readonly WORKER_SCRIPT=grpo-jax-worker.sh

DRY_RUN=0
TAKEN=0
COMMAND=()
WHERE=()

common_usage() {
  cat <<EOF
Common flags (or the environment, or tpu_setup/env.sh; flags win, then the environment):
  --name NAME        name of the TPU and of its queued resource  (TPU_NAME)
  --project PROJECT  Google Cloud project id                     (PROJECT)
  --zone ZONE        for example us-east5-b                      (ZONE)
  --type TYPE        v4-8, v5litepod-8 (or v5e-8), v5p-8, v6e-8  (ACCELERATOR_TYPE)
  --dry-run          print the gcloud commands, run nothing
  --help             this text
EOF
}

note() { printf '%s\n' "$*" >&2; }

fail() { # fail CODE MESSAGE
  printf '%s: %s\n' "${0##*/}" "$2" >&2
  exit "$1"
}

usage_error() { fail 2 "$1 (--help shows the usage)"; }

load_env() { # a value in the environment wins over the same line of env.sh
  local key pair kept=()
  [[ -f $HERE/env.sh ]] || return 0
  for key in $SETTINGS; do
    [[ -z ${!key:-} ]] || kept+=("$key=${!key}")
  done
  # shellcheck source=/dev/null
  source "$HERE/env.sh"
  for pair in ${kept[@]+"${kept[@]}"}; do
    printf -v "${pair%%=*}" '%s' "${pair#*=}"
  done
}

need_value() { # need_value FLAG [VALUE...]
  (($# >= 2)) || usage_error "$1 needs a value"
}

# Reads the common flags; `script_flag` of the calling script sees the others and says
# in TAKEN how many words it took. Words after -- go to COMMAND.
parse_flags() {
  local word
  while (($# > 0)); do
    case $1 in
      --help | -h) usage && exit 0 ;;
      --dry-run) DRY_RUN=1 && shift ;;
      --) shift && COMMAND=("$@") && return ;;
      --*=*) word=$1 && shift && set -- "${word%%=*}" "${word#*=}" "$@" ;;
      --name) need_value "$@" && TPU_NAME=$2 && shift 2 ;;
      --project) need_value "$@" && PROJECT=$2 && shift 2 ;;
      --zone) need_value "$@" && ZONE=$2 && shift 2 ;;
      --type) need_value "$@" && ACCELERATOR_TYPE=$2 && shift 2 ;;
      *)
        TAKEN=0
        script_flag "$@"
        ((TAKEN > 0)) || usage_error "unknown argument $(printf '%q' "$1")"
        shift "$TAKEN"
        ;;
    esac
  done
}

refuse_command() {
  ((${#COMMAND[@]} == 0)) || usage_error "only run.sh and babysit.sh take a command after --"
}

matches() { # matches WHAT VALUE REGEX HINT
  [[ $2 =~ $3 ]] || usage_error "$1 $(printf '%q' "$2") is not valid: $4"
}

whole_number() { matches "$1" "$2" '^(0|[1-9][0-9]{0,8})$' "expected a whole number"; }

validate_common() {
  [[ -n ${TPU_NAME:-} ]] || usage_error "no TPU name: give --name or set TPU_NAME"
  [[ -n ${PROJECT:-} ]] || usage_error "no project: give --project or set PROJECT"
  [[ -n ${ZONE:-} ]] || usage_error "no zone: give --zone or set ZONE"
  matches "name" "$TPU_NAME" '^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$' \
    "lowercase letters, digits and hyphens, starting with a letter"
  matches "project" "$PROJECT" '^[a-z]([-a-z0-9.:]{0,61}[a-z0-9])?$' \
    "expected a project id such as my-project-123"
  matches "zone" "$ZONE" '^[a-z]+-[a-z]+[0-9]+-([a-z]|ai[0-9]+[a-z])$' \
    "expected a zone such as us-east5-b"
  [[ -z ${ACCELERATOR_TYPE:-} ]] || validate_type
  WHERE=(--project="$PROJECT" --zone="$ZONE")
}

validate_type() {
  case $ACCELERATOR_TYPE in
    tpu7x* | v7*) usage_error "TPU7x is not served by the Cloud TPU API; use GKE or a Compute Engine \
instance group: see 'GKE and TPU7x' in tpu_setup/README.md" ;;
    v5e-*) ACCELERATOR_TYPE=v5litepod-${ACCELERATOR_TYPE#v5e-} ;; # the API's name for v5e
  esac
  matches "type" "$ACCELERATOR_TYPE" '^(v4|v5litepod|v5p|v6e)-[1-9][0-9]{0,4}$' \
    "expected v4-N, v5litepod-N (or v5e-N), v5p-N or v6e-N"
}

cloud() { # the only caller of gcloud
  if ((DRY_RUN)); then
    { printf 'gcloud' && printf ' %q' "$@" && printf '\n'; } >&3
  else
    gcloud "$@" 3>&-
  fi
}

# Without the timeouts a preempted worker would block a command for many minutes.
remote() { # remote WORKER VERB [ARGUMENT...]: runs the worker script on one or all workers
  local worker=$1 line
  shift
  printf -v line ' %q' "$@"
  cloud compute tpus tpu-vm ssh "$TPU_NAME" "${WHERE[@]}" --worker="$worker" --quiet \
    --ssh-flag=-oConnectTimeout=20 --ssh-flag=-oServerAliveInterval=30 \
    --command="bash $WORKER_SCRIPT$line" </dev/null
}

# Packs the tracked files as they are now, edits included, beside a REVISION file that
# names them. Untracked files stay here. `git stash create` changes no branch and no file.
pack_code() { # pack_code FILE
  local head snapshot revision
  head=$(git -C "$HERE" rev-parse --verify --quiet HEAD) ||
    fail 1 "no git commit to send; commit the code first"
  snapshot=$(git -C "$HERE" -c user.name=grpo-jax -c user.email=grpo-jax@localhost stash create)
  revision=$head
  if [[ -n $snapshot ]]; then
    revision=$head-dirty-$(git -C "$HERE" rev-parse --short=12 "$snapshot^{tree}")
    note "uncommitted edits are sent too, as revision $revision"
  fi
  printf '%s\n' "$revision" >"$SCRATCH/REVISION"
  git -C "$(git -C "$HERE" rev-parse --show-toplevel)" archive --format=tar \
    --output="$SCRATCH/code.tar" "${snapshot:-$head}"
  tar -rf "$SCRATCH/code.tar" -C "$SCRATCH" REVISION
  gzip -n -c "$SCRATCH/code.tar" >"$1"
}

# A file that git does not track stays here, and the command would not find it there.
refuse_files_not_sent() {
  local top word
  top=$(git -C "$HERE" rev-parse --show-toplevel 2>/dev/null) || return 0 # pack_code says it
  for word in "${COMMAND[@]}"; do
    [[ -f $top/$word && $word != /* ]] || continue
    git -C "$top" ls-files --error-unmatch -- "$word" >/dev/null 2>&1 ||
      usage_error "$word is not tracked by git, so it is not sent: git add $word"
  done
}

# Sends the code and the worker script to every worker; the workers unpack the code when
# no run is alive. An empty ARCHIVE means: pack the tree as it is now.
send_code() { # send_code ARCHIVE
  local archive=$1
  if [[ -z $archive ]]; then
    archive=$ARCHIVE_NAME
    if ! ((DRY_RUN)); then
      archive=$SCRATCH/$ARCHIVE_NAME
      pack_code "$archive"
    fi
  fi
  cloud compute tpus tpu-vm scp "$archive" "$HERE/$WORKER_SCRIPT" "$TPU_NAME:" \
    "${WHERE[@]}" --worker=all --quiet </dev/null
}

check_archive() { # check_archive FILE
  [[ $1 == */$ARCHIVE_NAME && -f $1 ]] ||
    usage_error "--archive needs a file made by babysit.sh, named $ARCHIVE_NAME"
}
