# make train: set up, then train joint pre-training on the embedded world.   make test: set up, then test.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
UV     := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)

.PHONY: setup megablocks train test slow test-slurm check lock clean

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.lock pyproject.toml | $(UV)
	$(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV)
	$(UV) pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

megablocks: $(VENV)/.megablocks

# Without its dependencies (it pins an old torch) and without its CUDA extension (it does not compile
# with CUDA 13): moonlit.models.moe.megablocks_kernels stands in for it.
$(VENV)/.megablocks: requirements-megablocks.lock $(VENV)/.ready | $(UV)
	PYTHONPATH=$(CURDIR)/.ci/without_cuda_extension $(UV) pip install --quiet --python $(BIN)/python \
	  --no-deps --no-build-isolation --require-hashes -r requirements-megablocks.lock
	touch $@

.uv/bin/uv:
	$(PYTHON) -m venv .uv
	.uv/bin/pip install --quiet uv

train: setup
	$(BIN)/moonlit train

test: setup megablocks
	$(BIN)/pytest -n auto

# BUDGET=240: begin no test after so many seconds, and with other files each day.
slow: setup megablocks
	$(BIN)/pytest -m "slow and not slurm" --durations=10 -rs $(BUDGET:%=--budget=%)
	$(BIN)/pytest -m compile -o addopts=--strict-markers

# As root, with Debian's slurmctld, slurmd, slurm-client and munge. All: make test-slurm SLURM=slurm
SLURM ?= slurm and not slow
test-slurm: setup
	$(BIN)/pytest -m "$(SLURM)" --durations=10 -rs $(BUDGET:%=--budget=%) tests/slurm

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

lock: | $(UV)
	$(UV) pip compile --quiet --python-version 3.11 --no-emit-index-url --generate-hashes \
	  --no-annotate --no-header --group dev --all-extras pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) .uv .pytest_cache .ruff_cache
