#!/usr/bin/env bash
# A Debian base for the images where no registry can be reached: `deploy/container/base.sh NAME`.
# Needs root, debootstrap and buildah; then `make image ENGINE=buildah BASE=NAME`.
set -euo pipefail
name=${1:?the name for the image: localhost/debian:bookworm-slim}
export BUILDAH_ISOLATION=${BUILDAH_ISOLATION:-chroot} STORAGE_DRIVER=${STORAGE_DRIVER:-vfs}

scratch=$(mktemp -d)
container=""
finish() {
  [ -z "$container" ] || buildah rm "$container" >/dev/null
  # debootstrap mounts these while it works, and leaves them when it is interrupted.
  umount -q "$scratch/root/proc" "$scratch/root/sys" || true
  rm -rf --one-file-system "$scratch"
}
trap finish EXIT

debootstrap --variant=minbase bookworm "$scratch/root" >"$scratch/log" || { tail "$scratch/log" >&2; exit 1; }
umount -q "$scratch/root/proc" "$scratch/root/sys" || true
# What Debian's own slim image leaves out, too.
tar -C "$scratch/root" --exclude='./proc/*' --exclude='./sys/*' --exclude='./var/cache/apt/*' \
  --exclude='./var/lib/apt/lists/*' --exclude='./var/log/*' --exclude='./usr/share/doc/*' \
  --exclude='./usr/share/man/*' --exclude='./usr/share/locale/*' --exclude='./usr/share/info/*' \
  -cf "$scratch/root.tar" .
container=$(buildah from scratch)
buildah add -q "$container" "$scratch/root.tar" /
buildah config --cmd /bin/bash "$container"
buildah commit -q "$container" "$name"
