# SPDX-License-Identifier: GPL-2.0
#
# What people type. The kernel's build reads Kbuild.

KDIR ?= /lib/modules/$(shell uname -r)/build

# All but the plain module runs in a build root of its own, which is made on first use.
lab := guest/build-root guest/lab
guests := $(if $(ACCEL),--accel $(ACCEL)) $(if $(VERBOSE),--verbose) $(if $(SEEDS),--seeds $(SEEDS)) \
	$(if $(TIME),--time $(TIME))

.PHONY: all deb in-tree demo bench bench-docs test test-long coverage kunit fuzz clippy fmt fmt-check clean help

all:
	@test -e $(KDIR)/Makefile || \
		{ echo "$(KDIR) is no kernel build tree; install the kernel's headers or set KDIR=" >&2; exit 1; }
	@grep -qs '^CONFIG_RUST=y' $(KDIR)/include/config/auto.conf || \
		{ echo "the kernel of $(KDIR) is built without Rust; set KDIR= to the tree of one with CONFIG_RUST=y" >&2; exit 1; }
	@test -e $(KDIR)/rust/libkernel.rmeta || \
		{ echo "$(KDIR) has no Rust metadata (headers packages leave it out); set KDIR= to the tree that the kernel was built in" >&2; exit 1; }
	$(MAKE) -C $(KDIR) M=$(CURDIR) $(if $(shell grep -s '^CONFIG_CC_IS_CLANG=y' $(KDIR)/include/config/auto.conf),LLVM=1) modules

# The driver's place in a kernel's source, and what goes there.
place := $(KSRC)/drivers/virtio/virtio_balloon_rs
sources := Kbuild Kconfig .kunitconfig $(wildcard *.rs rust/*.c rust/*.h tests/kunit/*.rs uapi/linux/*.h) \
	$(filter-out %_generated.rs,$(wildcard rust/*.rs))

in-tree:
	@test -e '$(KSRC)/drivers/virtio/Kconfig' || \
		{ echo "set KSRC= to the source of a kernel, 7.3 or newer" >&2; exit 1; }
	rm -rf '$(place)'
	mkdir '$(place)'
	cp --parents --preserve=timestamps $(sources) '$(place)'
	grep -q VIRTIO_BALLOON_RS '$(KSRC)/drivers/virtio/Makefile' || \
		sed -i '/virtio_balloon\.o$$/a obj-$$(CONFIG_VIRTIO_BALLOON_RS) += virtio_balloon_rs/' '$(KSRC)/drivers/virtio/Makefile'
	grep -q virtio_balloon_rs '$(KSRC)/drivers/virtio/Kconfig' || \
		sed -i '/^config VIRTIO_MEM$$/i source "drivers/virtio/virtio_balloon_rs/Kconfig"\n' '$(KSRC)/drivers/virtio/Kconfig'

deb:
	@$(lab) deb

demo:
	@$(lab) demo $(guests)

test:
	@$(lab) test $(if $(KERNEL),--kernel $(KERNEL)) $(if $(ONLY),--only '$(ONLY)') \
		$(if $(DRIVER),--driver $(DRIVER)) $(if $(DEVICE),--device $(DEVICE)) $(guests)

test-long:
	@$(lab) test --long $(guests)
	@$(lab) test --long --kernel test --device vhost-user $(guests)
	@$(lab) test --long --kernel test --driver c --device qemu $(guests)
	@$(lab) test --long --kernel test --driver c --device vhost-user $(guests)
	@$(lab) test --long --kernel test --device extended $(guests)
	@$(lab) test --long --kernel test --driver c --device extended $(guests)

coverage:
	@$(lab) coverage $(if $(ONLY),--only '$(ONLY)') $(guests)

bench:
	@$(lab) bench $(if $(ONLY),--only '$(ONLY)') $(guests)

bench-docs:
	@$(lab) bench --docs $(guests)

kunit:
	@$(lab) kunit $(if $(KERNEL),--kernel $(KERNEL)) $(guests)

fuzz:
	@$(lab) fuzz $(if $(TARGET),--target $(TARGET)) $(if $(SECONDS),--seconds $(SECONDS))

clippy:
	@$(lab) clippy

fmt:
	@$(lab) fmt

fmt-check:
	@$(lab) fmt --check

clean:
	rm -rf build
	$(if $(wildcard $(KDIR)/Makefile),$(MAKE) -C $(KDIR) M=$(CURDIR) clean)

help:
	@echo "make            build the module for the kernel of KDIR= (default: the running one)"
	@echo "make deb        build Debian packages of the module and of the host's programs"
	@echo "make in-tree    put the driver into the kernel source of KSRC=, as drivers/virtio/virtio_balloon_rs"
	@echo "make demo       inflate a balloon to 7 of a guest's 8 GiB, and compare with the C driver"
	@echo "make test       run every test: the host's own, KUnit in guests, scenarios in guests"
	@echo "make test-long  run what takes long, too: all scenarios in all kernels, and on the C driver"
	@echo "make coverage   say which lines of the module KUnit and the scenarios execute"
	@echo "make bench      measure what the balloon costs, and what others in its place do (20 minutes)"
	@echo "make bench-docs write docs/performance.md and its plots from the last results of make bench"
	@echo "make kunit      run KUnit in guests"
	@echo "make fuzz       fuzz what comes from guests, front ends and clients"
	@echo "make clippy     have clippy look at everything, and sparse at the module's C"
	@echo "make fmt        format the sources (make fmt-check: find out whether they are)"
	@echo "make clean      remove what was built in this checkout"
	@echo
	@echo "KERNEL=NAME        run the tests in that guest kernel only: test, debug, kcsan, arm64, arm64-64k, which"
	@echo "                   has pages of 64 KiB, or debian, which is Debian's own, with the module from the package"
	@echo "ONLY=TEXT          run the scenarios with TEXT in their name only (or: host, kunit, packages,"
	@echo "                   in-tree), or the benchmarks"
	@echo "DRIVER=rs|c        run the scenarios on that driver (default: rs)"
	@echo "DEVICE=NAME        run the scenarios on that balloon device, qemu, vhost-user or extended"
	@echo "                   (default: qemu, and a few on both)"
	@echo "TARGET=NAME        fuzz that target only"
	@echo "SECONDS=NUMBER     fuzz each target for so long (default: 60)"
	@echo "SEEDS=FROM..TO     plug the hostile devices of these seeds (default: from 0 on, for half a minute)"
	@echo "TIME=NUMBER        have the driver's work race for so many seconds (default: 60)"
	@echo "ACCEL=kvm|tcg      what runs the guests' instructions (default: kvm if the processor can)"
	@echo "VERBOSE=1          show the guests' logs while they run"
	@echo "KSRC=DIRECTORY     build the guests' kernels from that source"
	@echo
	@echo "deb, demo, test, kunit, clippy and fmt make a Debian 13 build root and the guests' kernels"
	@echo "in ~/.cache/virtio-balloon-rs on first use. They need root, 10 GiB of disk and a quarter"
	@echo "of an hour then, and a few seconds from then on, also in other clones."
