// SPDX-License-Identifier: GPL-2.0
#include <linux/module.h>

/* The `kernel` crate's module! has no field for it. */
MODULE_VERSION("0.2.0");
