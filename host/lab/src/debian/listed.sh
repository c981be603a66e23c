# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# The system before the packages are installed. systemd makes this directory when it starts any unit with a user of its
# own.

mkdir -p /var/lib/private
list >/before
