# Requires Python ≥ 3.11 and make; everything else is installed into .venv. `make` alone lists the targets.

# Interpreters to create .venv with; the first one that is new enough is used.
PYTHON ?= python3 python3.14 python3.13 python3.12 python3.11
# Additional arguments for the command of a target: `make test ARGS="-k queue -x"`.
ARGS ?=

# Number of test processes.
WORKERS ?= 2

VENV_PYTHON := .venv/bin/python
WHEEL_CHECK := build/wheel-check
OLDEST := build/oldest
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Do not check for newer versions of pyright.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help
help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-22s%s\n", $$1, $$2 }'

.PHONY: demo
demo: .venv/.installed ## Train DC-VAE on small real digits, results in runs/digits
	@$(VENV_PYTHON) train.py --recipe digits --run runs/digits $(ARGS)

.PHONY: test
test: .venv/.installed ## Run the tests (those that need a GPU are skipped without one)
	@OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -q -m "not slow" -n $(WORKERS) --dist loadfile $(ARGS)

.PHONY: test-slow
test-slow: .venv/.installed ## Run the tests that take over a minute each
	@$(VENV_PYTHON) -m pytest -q -m slow $(ARGS)

# The oldest versions that the ops support, without the rest of the project.
.PHONY: test-oldest
test-oldest: .venv/.installed ## Run the ops' tests with the oldest torch and Triton
	@mkdir -p build
	@test -x $(OLDEST)/bin/python || $(VENV_PYTHON) -m uv venv --quiet --python $(VENV_PYTHON) $(OLDEST)
	@$(VENV_PYTHON) -m uv pip install --quiet --python $(OLDEST)/bin/python \
		torch==2.11.0 triton==3.6.0 numpy==2.0.2 pytest==9.0.0 pytest-benchmark==5.1.0
	@PYTHONPATH=kernels $(OLDEST)/bin/python -m pytest -q -m "not slow" tests/kernels $(ARGS)

.PHONY: gpu-first
gpu-first: .venv/.installed ## Check a new GPU in eight minutes: ARGS="--out DIR"
	@$(VENV_PYTHON) bench/gpu.py --first $(ARGS)

.PHONY: gpu
gpu: .venv/.installed ## Run the tests and benchmarks that need a GPU, in eight minutes
	@$(VENV_PYTHON) bench/gpu.py $(ARGS)

.PHONY: gpu-step
gpu-step: .venv/.installed ## Benchmark training iterations on a GPU, in another eight minutes
	@$(VENV_PYTHON) bench/gpu.py --only step $(ARGS)

.PHONY: gpu-switches
gpu-switches: .venv/.installed ## Benchmark the settings that make iterations fast on a GPU, in another eight minutes
	@$(VENV_PYTHON) bench/gpu.py --only switches $(ARGS)

.PHONY: gpu-compare
gpu-compare: .venv/.installed ## Fail if our code has become slower than in the committed results of this GPU
	@$(VENV_PYTHON) bench/compare.py $(ARGS)

.PHONY: readme-tables
readme-tables: .venv/.installed ## Write the committed results into the documentation
	@$(VENV_PYTHON) bench/tables.py $(ARGS)

.PHONY: lint
lint: .venv/.installed ## Check style, formatting and types
	@$(VENV_PYTHON) -m ruff check --quiet .
	@$(VENV_PYTHON) -m ruff format --quiet --check .
	@$(MAKE) --no-print-directory types

.PHONY: types
types: .venv/.installed ## Check types only
	@$(VENV_PYTHON) -m pyright

.PHONY: format
format: .venv/.installed ## Format the code and fix what ruff can fix
	@$(VENV_PYTHON) -m ruff check --fix .
	@$(VENV_PYTHON) -m ruff format .

# The wheel is built from the source archive, so both are checked. Only base dependencies are installed. Another working
# folder and -I prevent this tree and PYTHONPATH from supplying a file that is missing in the wheel.
.PHONY: wheel-check
wheel-check: .venv/.installed ## Install the built wheel into an empty environment and import it there
	@rm -rf $(WHEEL_CHECK) && mkdir -p $(WHEEL_CHECK)/elsewhere
	@$(VENV_PYTHON) -m uv build --quiet --out-dir $(WHEEL_CHECK)/dist .
	@$(VENV_PYTHON) -m uv venv --quiet --python $(VENV_PYTHON) $(WHEEL_CHECK)/env
	@$(VENV_PYTHON) -m uv pip install --quiet --python $(WHEEL_CHECK)/env/bin/python -c constraints.txt \
		$(WHEEL_CHECK)/dist/*.whl
	@cd $(WHEEL_CHECK)/elsewhere && ../env/bin/python -I -W "ignore:Failed to initialize NumPy" -c \
		'import dcvae_kernels, dcvae_pipelines, dcvae_fast'
	@for package in dcvae_fast kernels/dcvae_kernels pipelines/dcvae_pipelines; do \
		diff -r -x __pycache__ $$package $(WHEEL_CHECK)/env/lib/python*/site-packages/$${package##*/} || exit 1; \
	done
	@echo "wheel: every file of the three packages is inside, and they import with the base dependencies alone"
	@rm -rf $(WHEEL_CHECK)

.PHONY: clean
clean: ## Remove builds and caches (not .venv, not runs)
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .benchmarks
	@find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# Three stamps, because an installer may consider a partly copied package complete. `.unfinished`: the first installation is
# running or was interrupted; after an interruption .venv is created again. `.updating`: the same for later installations;
# after an interruption all packages are reinstalled. `.installed`: complete. The lock protects against two concurrent makes.
# uv is several times faster than pip. The default build of torch also runs without a GPU.
.venv/.installed: setup.py constraints.txt
	@if command -v flock >/dev/null; then exec 9<Makefile; flock 9; fi; \
	if [ .venv/.installed -nt setup.py ] && [ .venv/.installed -nt constraints.txt ]; then exit 0; fi; \
	if [ -e .venv/.unfinished ]; then rm -rf .venv; fi; \
	if ! [ -x $(VENV_PYTHON) ]; then \
		for python in $(PYTHON) none; do \
			"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
		done; \
		if [ "$$python" = none ]; then \
			echo "Python 3.11 or newer is required, but none of $(PYTHON) is:" \
				"set its path, for example \`make PYTHON=/path/to/python3.12\`." >&2; \
			exit 1; \
		fi; \
		mkdir -p .venv && touch .venv/.unfinished && "$$python" -m venv .venv || exit 1; \
	fi; \
	echo "Installing into .venv (about 6 GB; minutes the first time)"; \
	if [ -e .venv/.updating ]; then reinstall=--reinstall; else reinstall=; fi; \
	if [ -t 2 ]; then quiet=; else quiet=--quiet; fi; \
	touch .venv/.updating && \
	$(VENV_PYTHON) -m pip install --quiet -c constraints.txt uv && \
	$(VENV_PYTHON) -m uv pip install $$quiet $$reinstall --compile-bytecode --python $(VENV_PYTHON) -c constraints.txt \
		-e ".[train,eval,dev]" && \
	rm -f .venv/.unfinished && mv .venv/.updating .venv/.installed
