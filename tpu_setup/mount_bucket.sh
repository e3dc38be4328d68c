#!/usr/bin/env bash
# Runs on a worker: mounts a bucket as a folder, in which a run can live. Safe to repeat.
#
# Usage: mount_bucket.sh gs://BUCKET FOLDER
set -euo pipefail

fail() {
  printf 'mount_bucket.sh: %s\n' "$1" >&2
  exit 1
}

[[ $# == 2 && $1 =~ ^gs://[a-z0-9][-a-z0-9_.]{1,220}[a-z0-9]$ ]] ||
  fail "usage: mount_bucket.sh gs://BUCKET FOLDER (not '$*')"
bucket=${1#gs://} folder=$2

install() {
  local key=/usr/share/keyrings/cloud.google.asc from=https://packages.cloud.google.com/apt
  curl -fsSL $from/doc/apt-key.gpg | sudo tee $key >/dev/null
  echo "deb [signed-by=$key] $from gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list
  sudo apt-get update
  sudo apt-get install -y gcsfuse
}

# Other workers write to the bucket too, so nothing that is known about a file may be old:
# on large machines gcsfuse would keep it for ever. In a bucket with a flat namespace
# folders are renamed only where a limit of files allows it.
mount() {
  gcsfuse --implicit-dirs --rename-dir-limit 100000 \
    --metadata-cache-ttl-secs 0 --metadata-cache-negative-ttl-secs 0 "$bucket" "$folder"
}

# A checkpoint is complete when its folder is renamed.
check_renaming() {
  local probe
  probe=$folder/.probe-$(hostname)-$$
  mkdir -p "$probe/a" && echo probe >"$probe/a/file"
  mv "$probe/a" "$probe/b" && [[ $(<"$probe/b/file") == probe ]] ||
    fail "$1 does not rename folders, so it cannot hold checkpoints. If it was mounted \
otherwise, unmount it (fusermount -u $folder) and run this again; else make a bucket with \
--enable-hierarchical-namespace"
  rm -r "$probe"
}

command -v gcsfuse >/dev/null || install
mkdir -p "$folder"
mountpoint -q "$folder" || mount
check_renaming "$1"
