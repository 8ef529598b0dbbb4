# Two commands matter: `make demo` and `make test`. Both work from a fresh clone with Python 3.11+ and nothing else.
PYTHON ?= python3
# The build of torch that setup installs first; any build within pyproject.toml's range will do.
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

setup: .venv/.installed ## make .venv and install the project with what its tests need

.venv/.installed: pyproject.toml
	@echo "setting up .venv: this takes some minutes, most of them for torch"
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) here: install Python 3.11 or newer, or name it: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12")'
	@$(PYTHON) -m venv .venv || { echo "could not make .venv: is the venv module installed (Debian, Ubuntu: apt install python3-venv)?"; exit 1; }
	@echo "1/2 torch $(TORCH)"
	@$(PIP) "torch==$(TORCH)"
	@echo "2/2 the project and what its tests need"
	@$(PIP) -e '.[dev]'
	@touch $@

demo: setup ## ask the embedded model about two regions of a drawn scene
	@mkdir -p build
	@echo "--- box $(BOX_1)"
	@$(BIN)/region-chat --image $(SCENE) --box $(BOX_1) --ask "What is this?" --save-overlay build/demo_1.png
	@echo "--- box $(BOX_2)"
	@$(BIN)/region-chat --image $(SCENE) --box $(BOX_2) --ask "What is this?" --save-overlay build/demo_2.png
	@$(BIN)/python scripts/join_images.py build/demo_1.png build/demo_2.png --out build/demo.png
	@echo "the regions as the model saw them: build/demo.png"

test: setup ## the tests, on a CPU
	$(BIN)/python -m pytest

test-slow: setup ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

test-faults: setup ## kill each command 20 times, fill its disk, signal it, start it twice (half an hour)
	$(BIN)/python -m pytest tests/faults -m "slow or not slow" --kills 20

test-fuzz: setup ## 1,000 hostile inputs for each format that is read (ten minutes)
	$(BIN)/python -m pytest tests/faults/test_fuzz.py --fuzz-cases 1000

newest: ## run the tests with the newest version of each dependency that pyproject.toml allows, torchvision too, in .venv-newest
	@$(PYTHON) -m venv .venv-newest
	@.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade torch torchvision
	@.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager -e '.[dev]'
	.venv-newest/bin/python -m pytest

test-gpu: setup ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

mutations: setup ## which of COUNT (200) drawn changes of the sources the tests miss: SEED=1, SHARD=1/2 and 2/2 share the work
	$(BIN)/python -m tests.mutations --seed $(or $(SEED),1) --count $(or $(COUNT),200) --shard $(or $(SHARD),1/1)

mutations-known: setup ## the changes that the tests must notice (tests/mutations/known.json)
	$(BIN)/python -m tests.mutations --known

check: setup ## style and types, read only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: setup ## style, mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## the benchmarks; their tables are kept in docs/benchmarks.md
	$(BIN)/python scripts/bench/tower.py
	$(BIN)/python scripts/bench/chat.py
	$(BIN)/python scripts/bench/scoring.py

eval-demo: setup ## evaluate the embedded model on 40 drawn scenes, with every control (under 3 minutes)
	@test -f build/eval/shapes/dataset.json || $(BIN)/alpha-clip shapes --out build/eval/shapes --images 40 --seed 2 --split test
	$(BIN)/region-eval run --task shapes-caption --data build/eval/shapes --out build/eval/caption --controls
	$(BIN)/region-eval run --task shapes-vqa --data build/eval/shapes --out build/eval/vqa --region-input mask --controls

compatibility: setup ## write docs/compatibility.md from the tests that compare with other people's code
	$(BIN)/python -m pytest -m compatibility --write-compatibility

embedded-model: setup ## build an embedded model from nothing: CLIP, Alpha-CLIP, LLaVA (two and a half hours on 2 cores)
	$(BIN)/python scripts/shapes/build_embedded_model.py

embedded-scores: setup ## the README's table: score the embedded model on scenes it never saw
	$(BIN)/python scripts/shapes/score_embedded_model.py

clean: ## remove what make made
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
