# make demo   see it work        make test   prove it works
# make bench  the figures        make check  lint and types
# make module the kernel module  make install  onto this node
PY := .venv/bin/python
SHELL := /bin/bash

.PHONY: help setup demo test unit netns vm check module bench fuzz install uninstall clean

help: ; @sed -n 's/^# //p' $(firstword $(MAKEFILE_LIST))

setup: ; @tools/setup

test: setup ; $(PY) -m pytest
unit netns vm: setup ; $(PY) -m pytest tests/$@

check: setup
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

clean:
	rm -rf build *.egg-info vnet/py/*.egg-info .venv
	$(MAKE) -s -C vnet/ext/iptables clean
	$(MAKE) -s -C vnet/ext/kernel clean
