# make demo     see it work: two slices' real traffic, marked, recorded, answered for
# make test     prove it works: unit, netns and vm tests; installs what they need
# make truth-table   play every kind of packet, write docs/truth.md anew
# make truth    10^6 packets of slices that attack each other, each compared with the truth (PACKETS=, SEED=)
# make bench    measure it; writes docs/benchmarks.md
# make check    lint and types
# make module   build the kernel module for this kernel (KVER=... for another)
# make endurance  10^6 flows while rules, module, programs and table come and go (FLOWS=...)
# make vm-debug   the vm tests on a kernel with KASAN, lockdep, kmemleak (SERIES=6.1, TESTS=...)
# make fuzz     fuzz the decoder for SECONDS (600)
# make kills    kill the collector at random moments, KILLS times (50)
# make install  onto this node; make uninstall takes it away
PY := .venv/bin/python

.PHONY: help setup test unit netns vm truth truth-table demo bench check module fuzz kills endurance vm-debug install uninstall clean

help: ; @sed -n 's/^# //p' Makefile

setup: ; @tools/setup

test: setup ; @$(PY) -m pytest
unit netns vm: setup ; @$(PY) -m pytest tests/$@

# The tests fail where the page does not say what they see: that is what it is for.
truth-table: setup
	rm -rf build/truth
	-$(PY) -m pytest -q tests/netns/test_truth.py tests/vm/test_truth_debian.py
	PYTHONPATH=tests $(PY) -m truth.page build/truth docs/truth.md

truth: setup ; @PACKETS=$(PACKETS) SEED=$(SEED) tools/truth

demo: setup ; @tools/demo
bench: setup ; @tools/bench

check: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	$(MAKE) -s -C vnet/ext/kernel check

module: ; $(MAKE) -C vnet/ext/kernel
fuzz: setup ; $(MAKE) -C tests/fuzz run
kills: setup ; NETFLOW_KILLS=$(or $(KILLS),50) $(PY) -m pytest -s tests/netns/test_netflow_kills.py
endurance: setup ; @tests/endurance/run $(FLOWS)
vm-debug: setup ; @tests/debug/run $(or $(SERIES),6.1) $(TESTS)

install: ; tools/install
uninstall: ; tools/install --remove

clean:
	rm -rf build dist *.egg-info vnet/py/*.egg-info vnet/py/vnet/xtables vnet/py/vnet/bpf_objects
	rm -f vnet/py/vnet/_abi.* vnet/py/vnet/_bpf.* netflow/_ct.c netflow/*.so
	$(MAKE) -s -C vnet/ext/iptables clean
	$(MAKE) -s -C vnet/ext/kernel clean
