#!/bin/bash
# The first process of a "node": node_init.sh NAME STATE KEEP COMMAND...
# A node has its own host name, /tmp and /dev/shm; the paths of KEEP (separated by :) that lie under /tmp stay visible, as
# a shared file system would be.  Runs COMMAND and reaps orphans, so that the dead do not stay zombies.
set -e
name=$1 state=$2 keep=$3; shift 3
mount --make-rprivate /
mount -t proc proc /proc
hostname "$name"
ip link set lo up
mount --bind "$state/hosts" /etc/hosts
mount --bind "$state/resolv.conf" "$(readlink -f /etc/resolv.conf)" 2>/dev/null || true   # look-ups fail at once
outside=/run/$(basename "$state")-$name
mkdir -p "$outside"
mount --rbind /tmp "$outside"
mount -t tmpfs -o size=8g,mode=1777 tmp /tmp
IFS=:
for path in $keep; do
  case $path in /tmp/?*) mkdir -p "$path"; mount --rbind "$outside/${path#/tmp/}" "$path";; esac
done
unset IFS
umount -l "$outside"
mount -t tmpfs -o size=8g,mode=1777 shm /dev/shm
"$@" < /dev/null &
daemon=$!
set +e
trap 'kill -TERM $daemon' TERM INT
while kill -0 "$daemon" 2>/dev/null; do wait "$daemon"; done
