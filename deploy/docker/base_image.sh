#!/usr/bin/env bash
# Make the base of the CPU image with debootstrap, for machines that reach Debian's packages but no image registry.
# Needs root, debootstrap and buildah. The certificates that this machine trusts are trusted in it, too.
#
#   deploy/docker/base_image.sh NAME      then: build_cpu_image.sh --build-arg BASE=NAME
set -euo pipefail

name=$1
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase --include=ca-certificates bookworm "$root"
cp -r /usr/local/share/ca-certificates/. "$root/usr/local/share/ca-certificates/"
chroot "$root" update-ca-certificates >/dev/null
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*

container=$(buildah from scratch)
buildah copy --quiet "$container" "$root" /
# pip and uv look at these, not at the system's certificates.
buildah config --env SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt --env PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
    --cmd /bin/bash "$container"
buildah commit --quiet --rm "$container" "$name"
