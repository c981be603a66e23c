# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# What the package's tests have in common. They run in a Debian system, with its kernel's release.

release=$1
kept=/var/cache/virtio-balloon-rs
package=$(echo /packages/virtio-balloon-rs-dkms_*.deb)
version=$(dpkg-deb --field "$package" Version)

# Also a failure must be seen in the log.
install() {
	apt-get install --yes --reinstall --allow-downgrades ${1-$package} >/log 2>&1 || {
		cat /log
		exit 1
	}
	cat /log
}

hook() {
	/etc/kernel/postinst.d/dkms "${1-$release}" >/log 2>&1 || {
		cat /log
		exit 1
	}
	cat /log
}

is_there() {
	find "/lib/modules/$release" -name 'virtio-balloon-rs.ko*' | grep .
}

is_missing() {
	if is_there; then
		exit 1
	fi
	modprobe --set-version "$release" --show-depends virtio:d00000005v00001AF4 | grep '/virtio_balloon\.ko'
}

# Hides the kept trees until they are shown again. Copies would take long.
hide_trees() {
	mkdir /empty
	mount --bind /empty "$kept"
}

show_trees() {
	umount "$kept"
	rm -r /empty
}

# The log has a line with this text.
says() {
	grep "virtio-balloon-rs: $1" /log
}

# The files of the system, without those that installing any package changes.
list() {
	find / \( -path /proc -o -path /sys -o -path /dev -o -path /packages -o -path /run -o -path /tmp -o -path /var/tmp \
		-o -path /var/log -o -path /var/lib/apt -o -path /var/lib/dpkg -o -path /var/cache/apt \
		-o -path /var/cache/debconf -o -path '/var/lib/dkms/mok.*' -o -path /log -o -path /before -o -path /after \) \
		-prune -o -print | sort
}
