# SPDX-License-Identifier: GPL-2.0
#
# Targets for developers and users. The kernel's build reads Kbuild.

KDIR ?= /lib/modules/$(shell uname -r)/build

# The Rust compiler that built it.
RUSTC ?= rustc

# Everything except the plain module runs in a build root, which is made on first use.
lab := guest/build-root guest/lab
guests := $(if $(ACCEL),--accel $(ACCEL)) $(if $(VERBOSE),--verbose) $(if $(SEEDS),--seeds $(SEEDS)) \
	$(if $(TIME),--time $(TIME))

.PHONY: all deb in-tree patches patches-check demo demo-auto bench bench-docs bench-manager simulate test test-long coverage kunit fuzz clippy diagrams fmt fmt-check clean help

all:
	@test -e $(KDIR)/Makefile || \
		{ echo "$(KDIR) is not a kernel build tree; set KDIR= to the tree that the kernel was built in" >&2; exit 1; }
	@grep -qs '^CONFIG_RUST=y' $(KDIR)/include/config/auto.conf || \
		{ echo "the kernel of $(KDIR) is built without Rust; set KDIR= to the tree of one with CONFIG_RUST=y" >&2; exit 1; }
	@test -e $(KDIR)/rust/libkernel.rmeta || \
		{ echo "$(KDIR) has no Rust metadata (headers packages leave it out); set KDIR= to the tree that the kernel was built in" >&2; exit 1; }
	@release=$$(cat $(KDIR)/include/config/kernel.release); \
		printf '7.3\n%s\n' "$$release" | sort --check=quiet --version-sort || \
		{ echo "the kernel of $(KDIR) is $$release; the module needs 7.3 or newer" >&2; exit 1; }
	@built=$$(sed -n 's/^CONFIG_RUSTC_VERSION_TEXT="*\([^"]*\)"*$$/\1/p' $(KDIR)/include/config/auto.conf); \
		installed=$$($(RUSTC) --version); test "$$installed" = "$$built" || \
		{ echo "the kernel of $(KDIR) is built with $$built, and $(RUSTC) is $$installed; set RUSTC= to the former" >&2; exit 1; }
	$(MAKE) -C $(KDIR) M=$(CURDIR) RUSTC=$(RUSTC) $(if $(shell grep -s '^CONFIG_CC_IS_CLANG=y' $(KDIR)/include/config/auto.conf),LLVM=1) modules

# The driver's directory in a kernel's source, and its files.
place := $(KSRC)/drivers/virtio/virtio_balloon_rs
folders := balloon device features messages rust sources tests/kunit uapi
sources = Kbuild Kconfig .kunitconfig $(wildcard *.rs) \
	$(shell find $(folders) -name '*.[ch]' -o -name '*.rs' ! -name '*_generated.rs')

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

# Who signs the patches off.
AUTHOR ?= $(shell sed -n 's/^M:\t//p' MAINTAINERS | head -n 1)

patches:
	@test -e '$(KSRC)/rust/kernel/lib.rs' || \
		{ echo "set KSRC= to the source of a kernel, 7.3 or newer" >&2; exit 1; }
	@KSRC='$(abspath $(KSRC))' guest/build-root patches/make '$(abspath $(KSRC))' build/patches '$(AUTHOR)'

patches-check: patches
	@KSRC='$(abspath $(KSRC))' guest/build-root patches/check '$(abspath $(KSRC))' build/patches

deb:
	@$(lab) deb

demo:
	@$(lab) demo $(guests)

demo-auto:
	@$(lab) demo-auto $(guests)

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

	@guest/build-root env PROPTEST_CASES=100000 cargo test --release --locked --manifest-path host/Cargo.toml \
		--package balloon-policy

coverage:
	@$(lab) coverage $(if $(ONLY),--only '$(ONLY)') $(guests)

bench:
	@$(lab) bench $(if $(ONLY),--only '$(ONLY)') $(guests)

bench-docs:
	@$(lab) bench --docs $(guests)

bench-manager:
	@guest/build-root cargo bench --locked --quiet --manifest-path host/Cargo.toml --package balloon-manager \
		--bench sockets

simulator := guest/build-root cargo run --release --locked --quiet --manifest-path host/Cargo.toml \
	--package balloon-simulator -- $(if $(SEEDS),--seeds $(SEEDS))

simulate:
	@echo "Drivers leave 64 MiB to their guests:"
	@$(simulator)
	@echo "Drivers leave as much as virtio_balloon_rs does by default, and the pool has room for that:"
	@$(simulator) --default-reserves --room

kunit:
	@$(lab) kunit $(if $(KERNEL),--kernel $(KERNEL)) $(guests)

fuzz:
	@$(lab) fuzz $(if $(TARGET),--target $(TARGET)) $(if $(SECONDS),--seconds $(SECONDS))

clippy:
	@$(lab) clippy

# The SVG files are committed. Changing a diagram needs graphviz.
diagrams: $(patsubst %.dot,%.svg,$(wildcard docs/diagrams/*.dot))

docs/diagrams/%.svg: docs/diagrams/%.dot
	@command -v dot >/dev/null || { echo "dot is missing; install the package graphviz" >&2; exit 1; }
	dot -Tsvg -o $@.new $<
	sed -i '1a <!-- SPDX-License-Identifier: GPL-2.0 -->' $@.new
	mv $@.new $@

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
	@echo "make in-tree    copy the driver to drivers/virtio/virtio_balloon_rs of the kernel source KSRC="
	@echo "make patches    write rust/virtio/ as a series of patches for the kernel source KSRC= to build/patches"
	@echo "                (make patches-check: and build and test each step)"
	@echo "make demo       inflate 7 GiB of an 8 GiB guest, and compare with the C driver"
	@echo "make demo-auto  move memory between three guests with the manager, and compare (3 minutes)"
	@echo "make test       run the tests: host tests, KUnit and scenarios in guests"
	@echo "make test-long  run all scenarios in all kernels, on all devices, with both drivers (hours)"
	@echo "make coverage   show which lines of the module KUnit and the scenarios execute"
	@echo "make bench      benchmark against the C driver, virtio-mem and free page reporting (an hour or more)"
	@echo "                (ONLY=rotate: balloon-manager against other rules that divide a pool of memory, some 25 minutes)"
	@echo "make bench-docs write docs/performance.md, its plots and the README's table from the last results"
	@echo "make bench-manager measure the processor time of balloon-manager with 100 simulated VMs (2 minutes)"
	@echo "make simulate   compare the policy of docs/manager.md with other rules, on simulated hosts"
	@echo "make kunit      run KUnit in guests"
	@echo "make fuzz       fuzz the input of guests, front ends and clients"
	@echo "make clippy     run clippy on all Rust, and sparse on the module's C"
	@echo "make diagrams   draw docs/diagrams/*.svg from their sources; needs graphviz"
	@echo "make fmt        format the sources (make fmt-check: check only)"
	@echo "make clean      remove build products of this checkout"
	@echo
	@echo "KERNEL=NAME        run the tests in that guest kernel only: test, debug, kcsan, kcfi, latency, arm64,"
	@echo "                   arm64-16k and arm64-64k (pages of 16 and 64 KiB), riscv64, s390x, powerpc64le,"
	@echo "                   loongarch64 (compiles only), or debian (Debian's own, with the module from the package)"
	@echo "ONLY=TEXT          run only the scenarios with TEXT in their name (or: host, kunit, packages,"
	@echo "                   in-tree), or the benchmarks"
	@echo "DRIVER=rs|c        run the scenarios with that driver (default: rs)"
	@echo "DEVICE=NAME        run the scenarios on that balloon device, qemu, vhost-user or extended"
	@echo "                   (default: qemu, and a few on the others)"
	@echo "TARGET=NAME        fuzz that target only"
	@echo "SECONDS=NUMBER     fuzz each target for that time (default: 60)"
	@echo "SEEDS=FROM..TO     plug the hostile devices of these seeds (default: from 0 on, for half a minute), or"
	@echo "                   simulate the hosts of these seeds (default: 0..100)"
	@echo "TIME=NUMBER        run the races for that many seconds (default: 60)"
	@echo "ACCEL=kvm|tcg      QEMU's accelerator (default: kvm if the processor supports it)"
	@echo "VERBOSE=1          show the guests' logs while they run"
	@echo "KSRC=DIRECTORY     build the guests' kernels from that source"
	@echo "SUITE=sid          use Debian's newest kernel and compilers, in a build root and a cache of their own"
	@echo "AUTHOR=TEXT        sign the patches off as that author, NAME <ADDRESS> (default: MAINTAINERS)"
	@echo
	@echo "Targets other than all, in-tree, diagrams and clean make a Debian 13 build root and the guest kernels"
	@echo "in ~/.cache/virtio-balloon-rs on first use. That needs root, 10 GiB of disk, 9 GiB of memory and a"
	@echo "quarter of an hour to an hour; later uses, also in other clones, start within seconds."
