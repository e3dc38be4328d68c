#!/usr/bin/env bash
# Runs on a worker: mounts a bucket as a folder for run directories. Safe to repeat.
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

# Other workers also write to the bucket, so metadata must not be cached. By default
# gcsfuse caches it forever on large machines. In a bucket with a flat namespace it renames
# folders only up to a limit of files.
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
with other options, unmount it (fusermount -u $folder) and run this again; otherwise create a bucket with \
--enable-hierarchical-namespace"
  rm -r "$probe"
}

command -v gcsfuse >/dev/null || install
mkdir -p "$folder"
mountpoint -q "$folder" || mount
check_renaming "$1"
