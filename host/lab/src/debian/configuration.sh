# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# The versions of tools in the kernel's configuration may differ from those of the installed tools. Its options may not.

config=$(realpath "/lib/modules/$release/build/.config")
cp "$config" /config
sed -i -e 's/^\(CONFIG_CC_VERSION_TEXT="[^ ]*\) .*/\1 (Debian 14.9.0-1) 14.9.0"/' \
	-e 's/^CONFIG_GCC_VERSION=.*/CONFIG_GCC_VERSION=140900/' \
	-e 's/^CONFIG_PAHOLE_VERSION=.*/CONFIG_PAHOLE_VERSION=0/' \
	-e 's/^CONFIG_BINDGEN_VERSION_TEXT=.*/CONFIG_BINDGEN_VERSION_TEXT="bindgen 0.1"/' "$config"
[ "$(diff /config "$config" | grep -c '^>')" = 4 ]
# With the kept tree.
install
is_there
[ ! -e "$kept/$release/failed" ]
# An option that this source does not have: the tree is of no use, and a new one is not made.
hide_trees
echo CONFIG_WITHOUT_SOURCE=y >>"$config"
dkms uninstall "virtio-balloon-rs/$version" -k "$release"
dkms unbuild "virtio-balloon-rs/$version" -k "$release"
hook
says "the configuration of $release cannot be reproduced, see $kept/$release/log; install the missing tools"
grep '^< CONFIG_WITHOUT_SOURCE=y' "$kept/$release/log"
is_missing
show_trees
mv /config "$config"
hook
is_there
