# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# An upgrade of all packages from an earlier version.

earlier=0.0.1
for file in /packages/*.deb; do
	dpkg-deb --raw-extract "$file" /made
	for place in /made/usr/src/virtio-balloon-rs-*; do
		[ -e "$place" ] || continue
		sed -i "s/\"$version\"/\"$earlier\"/" "$place/dkms.conf"
		mv "$place" "${place%-*}-$earlier"
	done
	sed -i "s/$version/$earlier/g" /made/DEBIAN/*
	dpkg-deb --build --root-owner-group -Znone /made "/earlier-${file##*/}"
	rm -r /made
done
status() {
	dkms status virtio-balloon-rs -k "$release" | grep -o '/.*'
}
install "$(echo /earlier-*.deb)"
case $(status) in "/$earlier, $release, "*": installed"*) ;; *) exit 1 ;; esac
install "$(echo /packages/*.deb)"
case $(status) in "/$version, $release, "*": installed"*) ;; *) exit 1 ;; esac
is_there
[ -z "$(find /usr/src /var/lib/dkms /lib/modules -name "*$earlier*")" ]
rm /earlier-*.deb
