# Start with `make demo` or `make test`. Both work from a fresh clone and only need Python 3.11 or newer.
PYTHON ?= python3
# The version of torch that setup installs; any version allowed by pyproject.toml works.
TORCH ?= 2.13.0
BIN := .venv/bin
PIP = $(BIN)/python -m pip install --progress-bar off --disable-pip-version-check
SCENE := mllm/assets/scenes/scene_2.png
BOX_1 := 22,8,48,42
BOX_2 := 62,59,92,86

.DEFAULT_GOAL := help
.PHONY: help setup demo eval-demo test test-slow test-faults test-fuzz newest test-gpu mutations mutations-known check style bench compatibility embedded-model embedded-scores clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: .venv/.installed ## create .venv and install the project with the dependencies of its tests

.venv/.installed: pyproject.toml
	@echo "creating .venv: this takes a few minutes, mostly for torch"
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or newer, or choose another one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "expected Python 3.11 or newer, got " + sys.version.split()[0] + "; choose another one: make PYTHON=python3.12")'
	@$(PYTHON) -m venv .venv || { echo "creating .venv failed: is the venv module installed (Debian, Ubuntu: apt install python3-venv)?"; exit 1; }
	@echo "1/2 torch $(TORCH)"
	@$(PIP) "torch==$(TORCH)"
	@echo "2/2 the project and the dependencies of its tests"
	@$(PIP) -e '.[dev]'
	@touch $@

demo: setup ## ask the embedded model about two regions of a synthetic scene
	@mkdir -p build
	@echo "--- box $(BOX_1)"
	@$(BIN)/region-chat --image $(SCENE) --box $(BOX_1) --ask "What is this?" --save-overlay build/demo_1.png
	@echo "--- box $(BOX_2)"
	@$(BIN)/region-chat --image $(SCENE) --box $(BOX_2) --ask "What is this?" --save-overlay build/demo_2.png
	@$(BIN)/python scripts/join_images.py build/demo_1.png build/demo_2.png --out build/demo.png
	@echo "the image with both regions drawn on it: build/demo.png"

test: setup ## run the tests, on a CPU
	$(BIN)/python -m pytest

test-slow: setup ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

test-faults: setup ## kill each command 20 times, fill its disk, send signals, run two instances (half an hour)
	$(BIN)/python -m pytest tests/faults -m "slow or not slow" --kills 20

test-fuzz: setup ## fuzz each file format with 1,000 malformed inputs (ten minutes)
	$(BIN)/python -m pytest tests/faults/test_fuzz.py --fuzz-cases 1000

newest: ## run the tests with the newest version of each dependency that pyproject.toml allows, torchvision too, in .venv-newest
	@$(PYTHON) -m venv .venv-newest
	@.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade torch torchvision
	@.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager -e '.[dev]'
	.venv-newest/bin/python -m pytest

test-gpu: setup ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

mutations: setup ## apply COUNT (200) random mutations and list those that no test catches: SEED=1; SHARD=1/2 and 2/2 split the work
	$(BIN)/python -m tests.mutations --seed $(or $(SEED),1) --count $(or $(COUNT),200) --shard $(or $(SHARD),1/1)

mutations-known: setup ## check that the tests catch the mutations in tests/mutations/known.json
	$(BIN)/python -m tests.mutations --known

check: setup ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: setup ## fix the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## run the benchmarks; the results are in docs/benchmarks.md
	$(BIN)/python scripts/bench/tower.py
	$(BIN)/python scripts/bench/chat.py
	$(BIN)/python scripts/bench/scoring.py

eval-demo: setup ## evaluate the embedded model on 40 synthetic scenes, with all views (under 3 minutes)
	@test -f build/eval/shapes/dataset.json || $(BIN)/alpha-clip shapes --out build/eval/shapes --images 40 --seed 2 --split test
	$(BIN)/region-eval run --task shapes-caption --data build/eval/shapes --out build/eval/caption --all-views
	$(BIN)/region-eval run --task shapes-vqa --data build/eval/shapes --out build/eval/vqa --view mask --all-views

compatibility: setup ## write docs/compatibility.md from the tests that compare with other implementations
	$(BIN)/python -m pytest -m compatibility --write-compatibility

embedded-model: setup ## rebuild the embedded model from random weights: CLIP, Alpha-CLIP, LLaVA (two and a half hours on 2 cores)
	$(BIN)/python scripts/shapes/build_embedded_model.py

embedded-scores: setup ## score the embedded model on held-out scenes: the table in docs/shapes.md
	$(BIN)/python scripts/shapes/score_embedded_model.py

clean: ## remove everything that make created
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
