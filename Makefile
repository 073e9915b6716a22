# `make demo` and `make test` need Python 3.11 or newer and nothing else: both set up their own virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint notebooks bars bench clean

demo: $(READY)  ## the main job: bond sensitivities from Treasury bill data, by every route, with a picture
	$(BIN)/sdesens check tbill --plot tbill.png

test: $(READY) lint  ## everything that must pass
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: $(READY)  ## execute the notebooks and save them with their outputs (three minutes)
	$(BIN)/python notebooks/build.py

bars: $(READY)  ## the accuracy claims of docs/accuracy.md at full size (half an hour)
	$(BIN)/python benchmarks/bars.py
	$(BIN)/python benchmarks/jumps.py
	$(BIN)/python benchmarks/diffusion.py

bench: $(READY)  ## speed beside torchsde, diffrax, jax, numba and hand-written loops (half an hour)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[all,bench]'
	$(BIN)/python benchmarks/speed.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[all]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
