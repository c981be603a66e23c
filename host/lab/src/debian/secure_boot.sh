# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# With Secure Boot the package says how to enrol the key with which DKMS has signed the module.

modinfo --set-version "$release" --field signer virtio_balloon_rs | grep 'DKMS module signing key'
# There is no firmware here.
cat >/usr/bin/mokutil <<-'END'
	#!/bin/sh
	case $1 in
	--sb-state) echo "SecureBoot enabled" ;;
	--test-key) echo "$2 is $(cat /enrolled) enrolled" ;;
	esac
END
chmod +x /usr/bin/mokutil
echo not >/enrolled
# A key that DKMS has been configured to use.
printf '%s\n' mok_signing_key=/own.key mok_certificate=/own.pub >/etc/dkms/framework.conf.d/own.conf
install
says "Secure Boot is enabled, and the key of DKMS is not enrolled; run mokutil --import /own.pub and reboot"
rm /etc/dkms/framework.conf.d/own.conf /own.key /own.pub
install
says "Secure Boot is enabled, and the key of DKMS is not enrolled; run mokutil --import /var/lib/dkms/mok.pub and reboot"
echo already >/enrolled
install
if says "Secure Boot"; then
	exit 1
fi
rm /usr/bin/mokutil /enrolled
