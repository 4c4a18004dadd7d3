# jobsched: `make demo` and `make test` do everything on a new machine with Python 3.11 and pip.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
WORKERS ?= 2
IMAGES ?= server train-cpu train-cuda
# Build arguments that are set here or in the environment go on to docker build; DOCKER_FLAGS for anything else.
BUILD  = $(foreach arg,BASE TORCH EXTRAS VERSION PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_NO_INDEX \
         PIP_TRUSTED_HOST,$(if $(filter undefined,$(origin $(arg))),,--build-arg $(arg)=$($(arg)))) $(DOCKER_FLAGS)

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench serve images clean

help:  ## Show the targets.
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[torch,stacks,postgres,docker,kubernetes,ray,sim,test]'
	@touch $@

demo: $(STAMP)  ## A real parameter-server job on four virtual GPU nodes; a worker and a server are killed; it recovers.
	$(BIN)/jobsched demo

lint: $(STAMP)  ## ruff, mypy --strict, import-linter.
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint  ## Everything; says at the end what was skipped and why.
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

bench: $(STAMP)  ## One JSON line a figure: name, value, unit, peer, ratio. BENCH=full runs the large sizes.
	$(BIN)/python -m tests.benchmarks

serve: $(STAMP)  ## The server with the commented example config; Ctrl-C stops it, running replicas go on.
	$(BIN)/jobsched serve --config configs/local.yaml

images:  ## jobsched/{server,train-cpu,train-cuda}. IMAGES="server train-cpu" BASE=… PIP_INDEX_URL=… choose; see images/*/Dockerfile.
	set -e; for name in $(IMAGES); do docker build $(BUILD) -f images/$$name/Dockerfile -t jobsched/$$name . ; done

clean:  ## Remove what make made.
	rm -rf $(VENV) .demo build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
