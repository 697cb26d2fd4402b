# make demo     see it work: two slices' real traffic, marked, recorded, answered for
# make test     prove it works: unit, netns and vm tests; installs what they need
# make bench    measure it; writes docs/benchmarks.md
# make check    lint and types
# make module   build the kernel module for this kernel (KVER=... for another)
# make fuzz     fuzz the decoder for SECONDS (600)
# make install  onto this node; make uninstall takes it away
PY := .venv/bin/python

.PHONY: help setup test unit netns vm demo bench check module fuzz install uninstall clean

help: ; @sed -n 's/^# //p' Makefile

setup: ; @tools/setup

test: setup ; @$(PY) -m pytest
unit netns vm: setup ; @$(PY) -m pytest tests/$@

demo: setup ; @tools/demo
bench: setup ; @tools/bench

check: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	$(MAKE) -s -C vnet/ext/kernel check

module: ; $(MAKE) -C vnet/ext/kernel
fuzz: setup ; $(MAKE) -C tests/fuzz run

install: ; tools/install
uninstall: ; tools/install --remove

clean:
	rm -rf build dist *.egg-info vnet/py/*.egg-info vnet/py/vnet/xtables vnet/py/vnet/bpf_objects
	rm -f vnet/py/vnet/_abi.* vnet/py/vnet/_bpf.* netflow/_ct.c netflow/*.so
	$(MAKE) -s -C vnet/ext/iptables clean
	$(MAKE) -s -C vnet/ext/kernel clean
