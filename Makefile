# make demo, make test: all a newcomer needs. Every target sets the checkout up first (./setup, which
# does nothing when nothing changed).
.DEFAULT_GOAL := help
.NOTPARALLEL: # make -j demo test would set up twice at once
.PHONY: help setup setup-tests demo test test-fast run lint format build man deb eval-tiny train-tiny bench bench-engine bench-sched bench-fs bench-tools bench-daemon bench-paper bench-gateway lock clean distclean
PY := .venv/bin/python
ARGS ?=

help:
	@echo 'make demo [MODEL=tiny]                      agents on a real model (94 MB), live; leaves nothing behind'
	@echo 'make test [ARGS="-k NAME"]                  the whole test suite, in some 20 minutes'
	@echo 'make test-fast [ARGS=...]                   the tests that need no mount, in four minutes'
	@echo 'make run MOUNT=DIR STATE=DIR [MODEL=PATH]   the daemon in the foreground'
	@echo 'make setup | setup-tests                    system packages, .venv, C++ extension | what the tests need, too'
	@echo 'make lint | format                          ruff, mypy --strict | ruff format'
	@echo 'make build                                  the C++ extension of the engine again'
	@echo 'make man                                    build/man: the pages of man/ for man(1)'
	@echo 'make deb                                    dist/aiosd_VERSION_ARCH.deb, for this release of Debian (TORCH=cuda: for GPUs)'
	@echo 'make eval-tiny | train-tiny                 the built-in model: measure it, make it again'
	@echo 'make bench | bench-{engine,sched,fs,tools,daemon,paper,gateway} all of them, or one'
	@echo 'make lock                                   requirements*.lock from pyproject.toml'
	@echo 'make clean | distclean                      remove what was built | and .venv'

setup:
	@./setup

setup-tests:
	@./setup --tests

# MODEL=tiny: with the built-in model alone, and no download.
demo:
	@./setup $(if $(filter tiny,$(MODEL)),,--model)
	@MODEL="$(MODEL)" exec $(PY) examples/demo.py $(ARGS)

test: setup-tests
	@tests/run $(ARGS)

# For everyday work, also of an ordinary user: what is not installed is skipped here.
test-fast: setup
	@tests/run -m 'not slow' $(wildcard tests/t[0-3]_*.py) $(ARGS)

# exec: a SIGTERM for make reaches the daemon itself.
run: setup
	@test -n "$(MOUNT)" && test -n "$(STATE)" || { echo 'usage: make run MOUNT=DIR STATE=DIR [MODEL=PATH]' >&2; exit 2; }
	@exec $(PY) -m aiosd --mount "$(MOUNT)" --state "$(STATE)" $(if $(MODEL),--model "$(MODEL)") $(ARGS)

lint: setup
	$(PY) -m pytest tests/t0_lint.py $(ARGS)

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

build: setup
	$(PY) -m aiosd.cores.engine.build

# Needs no .venv, but go-md2man.
MANUAL ?= build/man
man: $(patsubst man/%.md,$(MANUAL)/%,$(wildcard man/*.md))

$(MANUAL)/%: man/%.md man/blocks.sed
	@mkdir -p $(@D)
	@go-md2man -in $< -out $@
	@sed -i -f man/blocks.sed $@

# Needs no .venv: the package is made for Debian's own python3. The first time takes minutes, then seconds. TORCH=cuda
# puts PyPI's torch into it.
deb:
	@dpkg-checkbuilddeps || { echo 'as root: apt-get build-dep .' >&2; exit 1; }
	mkdir -p dist
	DIST=dist DEB_RULES_REQUIRES_ROOT=no debian/rules clean binary
	debian/rules clean

eval-tiny: setup
	$(PY) models/tiny/evaluate.py $(ARGS)

train-tiny: setup
	$(PY) models/tiny/train.py $(ARGS)

bench: bench-engine bench-sched bench-fs bench-tools bench-daemon bench-paper bench-gateway

bench-engine: setup
	$(PY) -m bench.engine $(ARGS)

bench-sched: setup
	$(PY) -m bench.sched $(ARGS)

bench-fs: setup
	$(PY) -m bench.fs $(ARGS)

bench-tools: setup
	$(PY) -m bench.tools $(ARGS)

bench-daemon: setup
	$(PY) -m bench.daemon $(ARGS)

bench-gateway: setup
	$(PY) -m bench.gateway $(ARGS)

bench-paper:
	@./setup --tests
	$(PY) -m bench.paper $(ARGS)

# Keeps the versions that still fit; to move on, delete the line (or the file) first.
# PyPI's torch asks for CUDA on Linux; a machine without a GPU shall not get that, so it has its own file.
UVC := .venv/bin/uv pip compile --quiet --universal --python-version 3.11 --no-header --annotation-style line
lock: setup
	.venv/bin/python -m pip install --quiet uv
	cat requirements.lock requirements-cuda.lock | grep -v '^#' > .venv/all.lock
	$(UVC) --extra engine --extra plot --extra mcp --extra gateway --extra systemd --extra dev -o .venv/all.lock pyproject.toml > /dev/null
	{ echo '# Every Python package of the checkout (make lock; installed by ./setup).'; \
	  grep -Ev "^(nvidia-[^m]|cuda|triton)|== '(win32|emscripten)'" .venv/all.lock; } > requirements.lock
	{ echo '# What PyPI'\''s torch needs besides, on a machine with an NVIDIA GPU (make lock).'; \
	  grep -E '^(nvidia-[^m]|cuda|triton)' .venv/all.lock; } > requirements-cuda.lock
	{ echo '# The programs of others that tests/t5_clients.py runs (make lock; ./setup --tests installs them to .venv/clients).'; \
	  .venv/bin/uv pip compile --quiet --group test-clients --no-header --no-annotate; } > requirements-clients.lock

clean:
	rm -rf debian/aiosd debian/.debhelper debian/files debian/*.substvars debian/*.log debian/*stamp debian/*.debhelper
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .venv/.built
	find . -path ./.venv -prune -o \( -name __pycache__ -o -name '*.so' \) -print0 | xargs -0 rm -rf

distclean: clean
	rm -rf .venv
