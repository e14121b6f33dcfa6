# The commands of this repository. `make demo` and `make test` are all that a newcomer needs; both make .venv first.
VENV ?= .venv
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3.10 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && { echo $$p; break; }; done)
PY := $(VENV)/bin/python
# The oldest supported transformers, and the last whose T5 does not go through the attention interface.
OLDER_TRANSFORMERS := 5.0.0 5.14.1
OLDER := $(OLDER_TRANSFORMERS:%=$(VENV)-%)
# As in pyproject.toml, since --no-build-isolation installs none of it.
BUILD_REQUIRES := 'setuptools>=77' wheel ninja 'torch>=2.10'
SOURCES := setup.py MANIFEST.in $(shell find csrc -name '[!_.]*' -type f -not -path '*/__pycache__/*' 2>/dev/null)
CPP_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')
PYTEST = $(PY) -m pytest -q --durations=10
GPU_PROCESSES ?= 12

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest gpu-test sanitize build lint format bench wheel torch-matrix clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# .packages: the environment and everything that the tests, examples and tools need; made again with pyproject.toml.
$(VENV)/.packages: pyproject.toml
	@test -n "$(PYTHON)" || { echo "hf_flash needs Python 3.10 or newer: install it, or say make PYTHON=/path/to/python3"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo "hf_flash needs a C++17 compiler: install g++ or clang++, or set CXX"; exit 1; }
	@echo 'int main() { if (int zero = 0; zero) return 1; }' | $${CXX:-c++} -std=c++17 -x c++ -fsyntax-only - || \
		{ echo "hf_flash needs a C++17 compiler, and $${CXX:-c++} is none: set CXX to another"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || \
		{ echo "$(PYTHON) cannot make a virtual environment: install its venv module (Debian: python3-venv)"; exit 1; }
	@echo "hf_flash: filling $(VENV); the first time this downloads torch (some GB)"
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet $(BUILD_REQUIRES)
	$(PY) -m pip install --quiet --no-build-isolation --editable '.[dev]'
	@touch $@

# --no-build-isolation: the build uses the torch of .venv instead of downloading another.
$(VENV)/.built: $(VENV)/.packages $(SOURCES)
	$(PY) -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

# One release of transformers, with everything else from .venv behind it.
$(VENV)-%/.packages: $(VENV)/.built
	rm -rf $(@D)
	$(PY) -m venv --without-pip $(@D)
	$(PY) -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" > \
		$$($(@D)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/newest.pth
	$(PY) -m pip --python $(@D)/bin/python install --quiet 'transformers==$*'
	@touch $@

build: $(VENV)/.built  ## .venv with everything, both libraries compiled (again only when sources changed)

demo: $(VENV)/.built  ## fine-tune a real BERT on long documents: patched, measured, saved, reloaded
	$(PY) examples/finetune_bert_long.py

test: $(VENV)/.built  ## the CPU suite
	$(PYTEST) tests

test-oldest: $(OLDER:%=%/.packages)  ## BERT, GPT-2 and T5 on the oldest supported transformers and one between
	for version in $(OLDER_TRANSFORMERS); do \
		python=$(VENV)-$$version/bin/python; \
		$$python -c "import transformers as t; assert t.__version__ == '$$version', t.__version__" && \
			$$python -m pytest -q -k "bert or gpt2 or t5" tests/transformers || exit 1; \
	done

gpu-test: $(VENV)/.built  ## the tests that need a CUDA GPU, with each architecture's kernels; HF_FLASH_ARCH=sm90: one's
	$(PYTEST) -n $(GPU_PROCESSES) --dist worksteal -m "gpu and not sanitizer and not large" tests
	$(PYTEST) -m large tests

sanitize: $(VENV)/.built  ## compute-sanitizer over a small set of kernels, likewise; needs a CUDA GPU
	$(PYTEST) -m sanitizer tests

bench: $(VENV)/.built  ## measure against the peers and the goals: on the GPU where there is one, else the CPU
	$(PY) -m hf_flash bench

lint: $(VENV)/.built  ## ruff and clang-format, changing nothing
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP_FILES)

format: $(VENV)/.built  ## let ruff and clang-format rewrite the tree
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP_FILES)

wheel: $(VENV)/.packages  ## dist/hf_flash-*-cp310-abi3-*.whl
	$(PY) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	@ls -l dist

torch-matrix: wheel  ## that one wheel under several releases of torch, CPU-only and CUDA
	bash tests/build/torch_matrix.sh $(PY) dist/hf_flash-*-cp310-abi3-*.whl

clean:  ## remove what was built; keeps the packages in .venv
	rm -rf build dist outputs *.egg-info hf_flash/*.so $(VENV)/.built $(OLDER)
