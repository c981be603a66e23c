# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# A kernel of the next series: its source is missing, out of step, or one for which the module does not build. The
# installation of these packages never fails.

next=7.4.1+deb13-cloud-amd64
headers=/usr/src/linux-headers-$next

# Installs the files in /made as a package.
install_made() {
	mkdir -p /made/DEBIAN
	cat >/made/DEBIAN/control <<-END
		Package: $1
		Version: $2
		Architecture: all
		Maintainer: The tests <root@localhost>
		Description: stands for a package of Debian's
	END
	dpkg-deb --build -Znone /made /made.deb
	rm -r /made
	install /made.deb
}

install_source() {
	mkdir -p /made/usr/src "linux-source-7.4"
	echo '$(error this series is not known)' >linux-source-7.4/Makefile
	tar -cJf /made/usr/src/linux-source-7.4.tar.xz linux-source-7.4
	install_made linux-source-7.4 "$1"
}

cd /
mkdir -p "/made$headers/include" "/made/usr/lib/modules/$next" /made/boot /made/DEBIAN
cp "/usr/src/linux-headers-$release/.config" "/usr/src/linux-headers-$release/Module.symvers" "/made$headers"
cp "/made$headers/.config" "/made/boot/config-$next"
ln -s "$headers" "/made/usr/lib/modules/$next/build"
printf '#!/bin/sh\nexec run-parts --exit-on-error --arg=%s /etc/kernel/header_postinst.d\n' "$next" >/made/DEBIAN/postinst
chmod +x /made/DEBIAN/postinst
install_made "linux-headers-$next" 7.4.1-1
says "the source of $next is missing; install linux-source-7.4"
install_source 7.4.2-1
says "linux-source-7.4 is 7.4.2-1 and linux-headers-$next is 7.4.1-1; install both in the same version"
install_source 7.4.1-1
says "the module does not build for $next (.*this series is not known.*), see $kept/$next/log; "
install
says "the module does not build for $next"

sed -i 's/^CONFIG_RUSTC_VERSION_TEXT=.*/CONFIG_RUSTC_VERSION_TEXT="rustc 1.99.0"/' "$headers/.config"
hook "$next"
says "the kernel $next is built with rustc 1.99.0, but rustc .* is installed; install the former"
[ ! -e "/lib/modules/$next/updates" ]
dpkg --purge "linux-headers-$next" linux-source-7.4
rm -r made.deb linux-source-7.4

# Without its headers.
build=/lib/modules/$release/build
mv "$build" /headers
install
is_missing
hook
grep 'headers for this kernel do not seem to be installed' /log
mv /headers "$build"
run-parts --exit-on-error --arg="$release" /etc/kernel/header_postinst.d
is_there
[ ! -e "$kept/$next" ]
