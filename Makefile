# Each verb works from a bare clone: the environment in .venv is built when it is missing or old.
# TORCH is installed first and alone, and nothing after it may replace it:
#   make demo TORCH="torch==2.13.0 --index-url <the index of the build you want>"
PYTHON ?= python3
TORCH ?= torch==2.13.0

BIN := .venv/bin
READY := .venv/ready
ROOMS := $(patsubst %/py.typed,%,$(wildcard */py.typed))

# oneDNN picks AMX for bf16 where the processor names it; some virtual machines name it and crash.
export ONEDNN_MAX_CPU_ISA ?= AVX512_CORE_BF16
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-gpu lint bench

demo: $(READY)
	$(BIN)/puna demo

# One process a core with one thread each: faster than one process with all threads.
test: export OMP_NUM_THREADS = 1
test: $(READY)
	$(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile

test-gpu: $(READY)
	$(BIN)/pytest -m gpu

# Mypy does not see through an editable install, so it reads the rooms through links.
lint: $(READY)
	$(BIN)/ruff check .
	rm -rf build/mypy && mkdir -p build/mypy/puna
	for room in $(ROOMS); do ln -s ../../../$$room build/mypy/puna/$$room; done
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/puna bench

$(READY): pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --upgrade pip "setuptools>=77" "pybind11>=2.12" wheel
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -c 'from importlib.metadata import version as v; print("torch==" + v("torch"))' \
		> .venv/torch.txt
	$(BIN)/python -m pip install -c .venv/torch.txt --no-build-isolation -e ".[dev,peers]"
	touch $@
