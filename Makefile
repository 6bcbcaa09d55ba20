# make            what there is
SHELL := /bin/bash
# PROFILE=dev builds faster and runs slower: for trying things.
PROFILE ?= release
export DROVEWAY ?= target/$(if $(filter dev,$(PROFILE)),debug,$(PROFILE))/droveway
.DEFAULT_GOAL := help

help:            ## this list
	@grep -E '^[a-z-]+: *##|^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 18

build:           ## the binary: target/release/droveway
	@scripts/deps.sh build
	cargo build --profile $(PROFILE) --locked

demo:            ## two hosts with Docker, three containers, and the walk of a packet
	@scripts/demo.sh check
	@scripts/deps.sh build demo
	@echo "building droveway (a few minutes the first time)"
	cargo build --profile $(PROFILE) --locked
	@scripts/demo.sh up

demo-down:       ## takes the demo away
	@scripts/demo.sh down

test:            ## what CI runs of tests; installs what they need
	@scripts/deps.sh build test
	@scripts/test.sh

soak:            ## the long form: many seeds, fault storms, installs on fresh machines
	@scripts/deps.sh build test soak
	@scripts/soak.sh

bench:           ## ratios against kernel VXLAN by hand, attach latency, memory
	@scripts/deps.sh build bench
	@scripts/bench.sh

ci:              ## everything CI does
	@.ci/run

install: build   ## to /usr/local/bin, with systemd units
	install -D -m 0755 $(DROVEWAY) $(DESTDIR)/usr/local/bin/droveway
	install -D -m 0644 contrib/systemd/droveway-server.service $(DESTDIR)/etc/systemd/system/droveway-server.service
	install -D -m 0644 contrib/systemd/droveway-agent.service $(DESTDIR)/etc/systemd/system/droveway-agent.service

.PHONY: help build demo demo-down test soak bench ci install
