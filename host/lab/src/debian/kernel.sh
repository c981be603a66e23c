# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# Kernels come and go with a real apt: the release's own, which is too old, and after it one of the backports. Nothing of
# the module stays when its kernel is removed.

remove() {
	apt-get purge --yes --autoremove "linux-image-$1" "linux-headers-$1"
	[ ! -e "$kept/$1" ]
	if find / -xdev -path "*/$1/*" -name 'virtio-balloon-rs*' | grep . || dkms status virtio-balloon-rs | grep "$1"; then
		exit 1
	fi
}

# The kernel that boots next.
newest() {
	readlink /vmlinuz | sed 's/.*vmlinuz-//'
}

kernel='--no-install-recommends linux-image-cloud-amd64 linux-headers-cloud-amd64'
apt-get update
is_there
# The headers of any of Debian's kernels are enough, so that apt does not add another kernel.
if apt-get satisfy --simulate "$(dpkg-deb --field "$package" Recommends)" | grep '^Inst'; then
	exit 1
fi
remove "$release"
install "$kernel"
old=$(newest)
says "the kernel $old is older than 7.3; "
release=$old
is_missing
install "$kernel linux-source --target-release=trixie-backports"
release=$(newest)
[ "$release" != "$old" ]
is_there
# The line about the old kernel is not repeated whenever the package has looked for kernels to build for.
if says "the kernel $old "; then
	exit 1
fi
remove "$old"
is_there
