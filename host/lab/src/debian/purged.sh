# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# Nothing remains of the packages when they are purged, also of what their units have made.

mkdir -p /var/lib/private/vhost-user-balloon/vm
ln -s private/vhost-user-balloon /var/lib
apt-get purge --yes virtio-balloon-rs-dkms vhost-user-balloon balloonctl balloon-manager
list >/after
if comm -13 /before /after | grep .; then
	exit 1
fi
