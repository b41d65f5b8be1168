# Every target sets up what it needs in .venv; a fresh machine needs Python, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/uv pip install --quiet --system-certs --python $(BIN)/python

.PHONY: demo test test-fast fuzz rooms mutations bench bench-quality check format lint types clean

demo: $(VENV)/demo.stamp
	$(BIN)/python -m launch.demo demo-data
	$(BIN)/sae sweep configs/demo.yaml
	$(BIN)/sae latents runs/demo
	@echo "Look at the latents, try a text, steer: $(BIN)/sae browse runs/demo"

# Three workers on two cores: some tests wait, for processes and clusters, while others compute. A
# file's tests stay together and slow files come first (tests/conftest.py). A worker that dies ends
# the run: else pytest-xdist waits for its other tests for ever.
PYTEST := $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder --max-worker-restart 0

test: $(VENV)/test.stamp
	$(PYTEST) -n 3

# For daily work: all but those marked slow.
test-fast: $(VENV)/test.stamp
	$(PYTEST) -n 2 -m 'not slow'

# Files, words and file systems broken at random, N inputs; each failure names the command that
# repeats it.
N ?= 10000
SEED ?= 0
fuzz: $(VENV)/test.stamp
	$(BIN)/python -m tests.fuzz --inputs $(N) --seed $(SEED) --minutes $(or $(MINUTES),60) \
	    $(if $(KINDS),--kinds $(KINDS)) $(if $(REPLAY),--replay $(REPLAY))

# The code broken on purpose, a line at a time: does a test of exactness turn red? docs/exactness.md.
mutations: $(VENV)/test.stamp
	$(BIN)/python -m tests.mutations

# Ratios, measured on this machine: docs/performance.md. FULL=--full takes longer.
bench: $(VENV)/bench.stamp
	$(BIN)/python -m benchmarks.run $(FULL)

# Beside other libraries' trainers at the same L0: docs/results.md. It goes on where it was stopped.
bench-quality: $(VENV)/bench.stamp
	$(BIN)/python -m benchmarks.quality runs/quality

# docs/rooms.svg, from the imports.
rooms: $(VENV)/test.stamp
	$(BIN)/python docs/draw_rooms.py

check: format lint types test

format: $(VENV)/test.stamp
	$(BIN)/ruff format --check .

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .

types: $(VENV)/test.stamp
	$(BIN)/mypy

$(VENV)/uv.stamp:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	touch $@

$(VENV)/demo.stamp: pyproject.toml $(VENV)/uv.stamp
	$(INSTALL) --editable '.[demo]'
	touch $@

# torch by pip and by number: where pip is set up with a CPU build it is taken, and then the
# test extra's own range is satisfied and nothing larger is fetched.
$(VENV)/test.stamp: pyproject.toml $(VENV)/uv.stamp
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(INSTALL) --editable '.[test]'
	touch $@

# nnsight, which dictionary_learning asks for, brings a torchvision that nothing here uses and whose
# build must be that of torch; without one transformers does as well.
$(VENV)/bench.stamp: pyproject.toml $(VENV)/uv.stamp
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(INSTALL) --editable '.[bench]'
	$(BIN)/uv pip uninstall --quiet --python $(BIN)/python torchvision
	$(BIN)/python -m launch.demo demo-data
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
