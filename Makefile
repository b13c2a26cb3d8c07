# make demo and make test do everything on a fresh machine: set-up into .venv, then the job.

VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: setup demo demo-real test test-wide test-faults lint docs dist bench fuzz clean

setup: $(STAMP)

# torch first and pinned: an open range would fetch a CUDA build of several gigabytes where the CPU one will do.
# PINNED= installs the newest of everything: constraints.txt wants Python 3.11.
PINNED := --constraint constraints.txt
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check $(PINNED)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	DS_BUILD_OPS=0 $(INSTALL) --editable ".[dev,metrics,gguf,qlora]"
	touch $(STAMP)

# Order 1 on the embedded tiny model and synthetic data: what SeqLoRA forgets and O-LoRA keeps.
demo: setup
	$(BIN)/cl-runner train --order order1 --method seqlora --preset tiny --data synthetic
	$(BIN)/cl-runner train --order order1 --method olora --preset tiny --data synthetic
	$(BIN)/cl-runner compare runs/order1-seqlora-tiny-t5-s42 runs/order1-olora-tiny-t5-s42
	$(BIN)/cl-runner compare runs/order1-seqlora-tiny-t5-s42 runs/order1-olora-tiny-t5-s42 --html runs/demo.html

# The same on a small real model and real rows, which are yours to bring: asked for before anything is fetched.
DATA ?= $(CL_RUNNER_DATA)
REAL := --order order1-three --preset smollm2-q4 --data-dir "$(DATA)"

ifneq ($(filter demo-real,$(MAKECMDGOALS)),)
ifneq ($(shell test -f "$(DATA)/TC/dbpedia/train.json" && echo there),there)
$(error demo-real: $(if $(DATA),$(DATA) holds no TC/dbpedia/train.json; )say make demo-real DATA=FOLDER, the benchmark's \
folder of TC/dbpedia, SC/amazon and TC/agnews (docs/data.md): CL_Benchmark in https://github.com/cmnfriend/O-LoRA)
endif
endif

demo-real: setup smollm2
	$(BIN)/cl-runner train $(REAL) --method seqlora
	$(BIN)/cl-runner train $(REAL) --method olora
	$(BIN)/cl-runner compare runs/order1-three-seqlora-smollm2-s42 runs/order1-three-olora-smollm2-s42
	$(BIN)/cl-runner compare runs/order1-three-seqlora-smollm2-s42 runs/order1-three-olora-smollm2-s42 --html runs/demo-real.html

smollm2: | setup
	PYTHON=$(BIN)/python scripts/get_smollm2.sh $@

# A worker more than there are cores: many a test waits for a process.
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile
WORKERS := $(shell n=$$(($$(nproc 2>/dev/null || echo 2) + 1)); echo $$((n < 5 ? n : 5)))

test: lint
	$(PYTEST) -m "not wide"

# Claims about all methods, kinds and families on the rest of them.
test-wide: setup
	$(PYTEST) -m wide

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# The site, in build/site; a link that leads nowhere is an error.
docs: setup
	$(INSTALL) --editable ".[docs]"
	$(BIN)/mkdocs build --strict

# Source archive and wheel, in dist/.
dist: setup
	$(BIN)/python -m hatchling build -d dist

# Kills, signals, full disks, damaged files, … (docs/reliability.md): a few of each, some minutes on two cores. LONG=1 has
# every place, and hundreds of kills of every method, kind and option, for an hour or so; it goes on where it was left.
FAULTS := OMP_NUM_THREADS=1 CL_RUNNER_FAULTS=faults/places.jsonl $(if $(LONG),CL_RUNNER_FAULTS_LONG=1)

test-faults: setup
	mkdir -p faults
	rm -f faults/places.jsonl
ifneq ($(LONG),)
	$(BIN)/python -m tests.faults.kills --json faults/kills.jsonl
endif
	$(FAULTS) $(BIN)/python -m pytest tests/faults --override-ini python_files='fault_*.py' --timeout 3600 --numprocesses 2 --dist loadfile
	$(BIN)/python -m tests.faults.table faults/*.jsonl

# Ratios side by side, an hour or so on two idle cores; benchmarks/README.md says what they are. On a GPU: see there.
bench: setup
	mkdir -p bench
	$(BIN)/python -m benchmarks.startup --json bench/results.jsonl
	$(BIN)/python -m benchmarks.evaluation --json bench/results.jsonl
	$(BIN)/python -m benchmarks.penalty --json bench/results.jsonl
	$(BIN)/python -m benchmarks.penalty --shape t5-base --batch 4 --steps 3 --rounds 2 --json bench/results.jsonl
	$(BIN)/python -m benchmarks.order --json bench/results.jsonl
	$(BIN)/python -m benchmarks.stages --curve 200 --out bench --json bench/results.jsonl

# 20,000 hostile inputs, in a file that a second call goes on with; docs/fuzzing.md says what they are. SEED=1: others.
SEED ?= 0
fuzz: setup
	$(BIN)/python -m tests.fuzz --cases 20000 --seed $(SEED) --out fuzz/cases.jsonl

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
