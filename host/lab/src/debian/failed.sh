# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# A module that does not build is skipped, too. It is not tried again before something changes.

sources=/usr/src/virtio-balloon-rs-$version
dkms uninstall "virtio-balloon-rs/$version" -k "$release"
dkms unbuild "virtio-balloon-rs/$version" -k "$release"
mount -t tmpfs -o size=1M none "$kept"
hook
says "$kept has 1 MiB of space, and the build for $release needs 1024; make room"
umount "$kept"
is_missing
echo 'this is no Rust' >>"$sources/balloon/mod.rs"
hook
line="the module does not build for $release (error: .*), see $kept/$release/log; "
says "$line"
is_missing
before=$(stat --format %y "$kept/$release/log")
hook
says "$line"
[ "$(stat --format %y "$kept/$release/log")" = "$before" ]
is_missing
sed -i '$d' "$sources/balloon/mod.rs"
hook
is_there
[ ! -e "$kept/$release/failed" ]
# What may pass is not recorded: a build that was interrupted, and one that has filled a disk.
passes() {
	dkms uninstall "virtio-balloon-rs/$version" -k "$release"
	dkms unbuild "virtio-balloon-rs/$version" -k "$release"
	mkdir /fake
	printf '#!/bin/sh\ncase "$*" in *M=*) %s;; esac\nexec /usr/bin/make "$@"\n' "$1" >/fake/make
	chmod +x /fake/make
	PATH=/fake:$PATH hook
	rm -r /fake
	says "the build for $release $2"
	is_missing
	hook
	is_there
}
passes 'kill $$' "was interrupted; run dkms autoinstall -k "
passes 'echo "No space left on device" >&2; exit 2' "has filled a disk; make room, "
