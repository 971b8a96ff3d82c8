# Each verb works from a bare clone: the environment in .venv is built when it is missing or old.
# TORCH is installed first and alone, and nothing after it may replace it:
#   make demo TORCH="torch==2.13.0 --index-url <the index of the build you want>"
PYTHON ?= python3
TORCH ?= torch==2.13.0

BIN := .venv/bin
READY := .venv/ready
NATIVE := $(wildcard csrc/*/*.* csrc/*/*/*.*)
ROOMS := $(filter-out puna,$(patsubst %/py.typed,%,$(wildcard */py.typed)))

# oneDNN picks AMX for bf16 where the processor names it; some virtual machines name it and crash.
export ONEDNN_MAX_CPU_ISA ?= AVX512_CORE_BF16
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo try-real test test-gpu gpu sanitize threads campaign lint aot bench

demo: $(READY)
	$(BIN)/puna demo

# A real chat model, SmolLM2-135M-Instruct, through SFT, both reward models and PPO, on the comparisons
# in the folder DATA.
try-real: $(READY)
	$(BIN)/puna demo real --data $(or $(DATA),$(error name your comparisons: make try-real DATA=FOLDER))

# One process a core with one thread each: faster than one process with all threads.
test: export OMP_NUM_THREADS = 1
test: $(READY)
	$(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile

test-gpu: $(READY)
	$(BIN)/pytest -m "gpu and not slow"

# What a GPU is for, in order: right first, then fast; each part within its time. FLAGS: --seconds
# 540 (of this call; the same again goes on), --only norms stages, --layers 8, --dry-run, --out PATH.
gpu: $(READY)
	$(BIN)/python -m puna.benchmarks.gpu $(FLAGS)

# The rooms are copied to build/$(1), with an extension under the sanitizers $(2) beside them.
define instrumented
	rm -rf build/$(1) && mkdir -p build/$(1)/puna
	cp -r puna/* $(ROOMS) build/$(1)/puna && rm -f build/$(1)/puna/core/_C*
	$(CXX) -std=c++17 -O1 -g -fopenmp -fPIC -shared -ffp-contract=fast -Wno-psabi $(2) \
		$$($(BIN)/python -m pybind11 --includes) -Icsrc $(filter %.cpp,$(NATIVE)) \
		-o build/$(1)/puna/core/_C$$($(BIN)/python \
		-c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
endef

# Addresses and undefined behaviour, over the tests of the engine, many calls in threads and random
# shapes for FUZZ seconds. (Leaks are not looked for: Python's own would hide them.)
ASAN := -fsanitize=address,undefined -fno-sanitize-recover=undefined
FUZZ ?= 60
sanitize: export PYTHONPATH = build/address
sanitize: export ASAN_OPTIONS = detect_leaks=0
sanitize: UNDER = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)"
sanitize: $(READY)
	$(call instrumented,address,$(ASAN))
	$(UNDER) $(BIN)/pytest -s tests/test_native*.py tests/test_threads.py tests/test_not_a_number.py \
		tests/test_rounded_weights.py tests/test_scored_alike.py -k "not peak"
	$(UNDER) $(BIN)/python tests/campaign/threads.py --threads 8 --calls 1000
	$(UNDER) $(BIN)/python tests/campaign/shapes.py --seconds $(FUZZ)

# Races, over the same calls in threads. One OpenMP thread a call: libgomp is not instrumented, and
# where its threads begin and end would be taken for races. (Addresses are not moved about: GCC's
# ThreadSanitizer cannot start where they are moved as far as newer kernels do.)
threads: export PYTHONPATH = build/thread
threads: export TSAN_OPTIONS = ignore_noninstrumented_modules=1 exitcode=66
threads: $(READY)
	$(call instrumented,thread,-fsanitize=thread)
	LD_PRELOAD="$$($(CXX) -print-file-name=libtsan.so)" setarch -R \
		$(BIN)/python tests/campaign/threads.py --threads 8 --calls 1000

# What outsiders do to a program, drawn at random, each for SECONDS: damaged files to every reader,
# wrong values to every option, kill -9 to every stage on one rank and on two.
SECONDS ?= 300
campaign: export OMP_NUM_THREADS = 1
campaign: $(READY)
	$(BIN)/python tests/campaign/readers.py --seconds $(SECONDS)
	$(BIN)/python tests/campaign/options.py --seconds $(SECONDS)
	$(BIN)/python tests/campaign/kills.py --seconds $(SECONDS)

# Mypy does not see through an editable install, so it reads the rooms through links.
lint: $(READY)
	$(BIN)/ruff check .
	rm -rf build/mypy && mkdir -p build/mypy/puna
	for part in $(ROOMS) $(notdir $(wildcard puna/*.*)); do \
		test -d $$part && ln -s ../../../$$part build/mypy/puna/$$part \
			|| ln -s ../../../puna/$$part build/mypy/puna/$$part; done
	$(BIN)/mypy

# What every Triton kernel becomes, without a GPU.
aot: $(READY)
	$(BIN)/python -m puna.benchmarks.aot --targets sm_90,gfx942

bench: $(READY)
	$(BIN)/puna bench --quick

$(READY): pyproject.toml setup.py $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --upgrade pip "setuptools>=77" "pybind11>=2.12" wheel
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -c 'from importlib.metadata import version as v; print("torch==" + v("torch"))' \
		> .venv/torch.txt
	$(BIN)/python -m pip install -c .venv/torch.txt --no-build-isolation -e ".[dev,peers,annotate]"
	touch $@
