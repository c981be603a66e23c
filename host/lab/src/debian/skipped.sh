# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# A kernel for which the module cannot be built now is skipped: apt and the kernel's hook succeed, and say why. The
# module is there again as soon as it can be built. A kept tree is enough for that.

source=$(echo /usr/src/linux-source-*.tar.xz)
mv $source /
hide_trees
install
says "the source of $release is missing; install linux-source-"
is_missing
hook
show_trees
dpkg-trigger --by-package=linux-source --no-await /usr/src
dpkg --triggers-only --pending
is_there
# The source of another version.
install
is_there
mv /${source##*/} /usr/src
