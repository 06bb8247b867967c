# make demo: cut a small DeiT to a third of its MACs on real images, and write a report.   make demo-sparse: the same
# model by sparse training, cut and fine-tuning.   make test: the tests, their quick lane.
# All set up a virtual environment in .venv first; a second call skips what is done.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
# 35% of those of the shipped baseline.
DEMO_MACS := 4.1e6
DEMO_SPARSE := runs/demo-sparse
BENCH := runs/bench
INSTALL := $(BIN)/python tools/install.py  # pip install, which says what it is doing

# OpenMP threads that wait spin for a while by default, milliseconds in GCC's: beside one busy process on a core
# that made training 17 times slower. Sleeping at once would slow small models on an idle machine; this is between.
export GOMP_SPINCOUNT ?= 10000

# Without the plugins of packages that other packages bring or that only bench/ops uses: each costs every test a
# little. Bytecode is written, also where an image's environment says not to: tests start processes that import the
# package again.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n auto --dist worksteal -p no:anyio -p no:benchmark

.PHONY: demo demo-sparse test test-all lint bench accuracy gpu baseline clean

demo: $(VENV)/built
	rm -rf $(DEMO)
	$(BIN)/vtp run --one-shot --macs $(DEMO_MACS) --out $(DEMO)

demo-sparse: $(VENV)/built
	rm -rf $(DEMO_SPARSE)
	$(BIN)/vtp run --out $(DEMO_SPARSE)

# Two workers where there is memory for two. The quick lane has every op, proof, module and promise, and of products
# of shapes, dtypes and paths a covering array (tests/support/covering.py).
test: $(VENV)/installed-dev $(VENV)/built
	$(PYTEST) -m "not thorough" $(ARGS)

# Everything; for changes to kernels, to the CPU engine, or to what the tests share.
test-all: $(VENV)/installed-dev $(VENV)/built
	$(PYTEST) $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The table of docs/accuracy.md: three seeds, an hour and a half on two cores; continues where it stopped.
accuracy: $(VENV)/installed $(VENV)/built
	mkdir -p runs
	$(BIN)/python -m bench.accuracy --out runs/accuracy.json
	$(BIN)/python -m bench.accuracy --out runs/accuracy.json --markdown

# The comparisons that the README's claims about speed rest on, beside every runtime that can be installed; half an
# hour on two cores; continues where it stopped. Writes $(BENCH); what docs/ shows of it is in bench/results.
bench: $(VENV)/installed-bench $(VENV)/built
	mkdir -p $(BENCH)
	$(BIN)/python -m bench.compare --out $(BENCH)/compare.json
	$(BIN)/python -m bench.latency_budget --out $(BENCH)/latency_budget.json
	$(BIN)/python -m pytest -q bench/ops --benchmark-columns=median,iqr,rounds --benchmark-json=$(BENCH)/ops.json

# Measure on this machine's GPU, in nine minutes: numerics, compute-sanitizer where installed, whole models, training
# steps, single ops; writes runs/gpu. Without a GPU it says so and fails.
gpu: $(VENV)/installed-dev
	$(BIN)/python -m bench.gpu

# The shipped baseline, from the original idx files (make baseline FASHION_MNIST=folder); about an hour.
baseline: $(VENV)/installed
	$(BIN)/vtp train dense --from-scratch --data $(FASHION_MNIST) --out runs/baseline --resume
	cp runs/baseline/dense.safetensors vtp/baselines/fashion_deit.safetensors

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

# Without the C++ operators at first: building them takes PyTorch's headers from the environment.
$(VENV)/installed: $(VENV)/pyvenv.cfg pyproject.toml setup.py tools/build_backend.py
	@echo "installing (PyTorch is several gigabytes; this is the longest step of a first run)"
	@VTP_BUILD_CPP=0 $(INSTALL) --editable .
	@touch $@

# At once with what everybody needs: pip looks through all of it each time.
$(VENV)/installed-dev: $(VENV)/pyvenv.cfg pyproject.toml setup.py tools/build_backend.py
	@echo "installing, with what tests and lint need (PyTorch is several gigabytes; the longest step of a first run)"
	@VTP_BUILD_CPP=0 $(INSTALL) --editable '.[dev]'
	@test -e $(VENV)/installed || touch $(VENV)/installed
	@touch $@

.NOTPARALLEL: # the two install into one environment

$(VENV)/installed-bench: $(VENV)/installed-dev
	@echo "installing other runtimes to compare with"
	@VTP_BUILD_CPP=0 $(INSTALL) --editable '.[dev,bench]'
	@touch $@

# The C++ operators; without a compiler, or with VTP_BUILD_CPP=0, there are none, and everything works without.
$(VENV)/built: $(VENV)/installed setup.py $(wildcard csrc/cpu/*)
	@$(BIN)/python tools/build_backend.py
	@$(INSTALL) --no-deps --editable .
	@ls vtp_kernels/_cpu*.so >/dev/null 2>&1 || echo "C++ operators: none; see why with VTP_BUILD_CPP=1 $(BIN)/pip install -v -e ."
	@touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info vtp_kernels/_cpu*.so
