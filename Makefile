# Every target does all of its own set-up. `make quickstart` and `make test` are the two that a newcomer needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*/*)
OLD_VENV := .venv-torch210
SANITIZED := $(patsubst %,tests/ops/test_%.py,feature_match localization localization_cpu box_overlap map_cosine channel_dot \
	class_relation backdoor autograd) tests/native/test_common.py tests/native/test_cuda_on_cpu.py
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup
ASAN_LIBRARIES = $(shell g++ -print-file-name=libasan.so) $(shell g++ -print-file-name=libubsan.so) \
	$(shell g++ -print-file-name=libstdc++.so)

.PHONY: quickstart test sass ptx docs bench lint format sanitize abi old-torch clean

quickstart: $(VENV)/.train
	$(BIN)/debiaskd quickstart --out quickstart-out

# CUDA sources on the CPU are tested under sanitizers, by `make sanitize`.
test: $(VENV)/.dev
	$(PYTEST) -m "not cuda_on_cpu"

# The documentation site in build/site: a broken link, a missing page or a docstring that cannot be read is an error.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# What the compilers made of an op's GPU kernels, without a GPU: make sass OP=localization KERNEL=sum_kernel ARCH=90
sass ptx: $(VENV)/.dev
	@$(BIN)/python tests/helpers/machine_code.py $@ $(OP) $(if $(ARCH),--arch $(ARCH)) $(if $(KERNEL),--kernel '$(KERNEL)')

bench: $(VENV)/.dev
	$(BIN)/debiaskd bench

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

# The op tests against libraries, and CUDA sources compiled for the CPU, that check every memory access and all arithmetic.
# LeakSanitizer would report Python; eager and Triton's interpreter have nothing to be checked; gradcheck calls what the
# other tests call, a hundred times.
sanitize: $(VENV)/.dev
	rm -rf build/sanitize
	DEBIASKD_SANITIZE=1 DEBIASKD_CUDA=0 $(BIN)/python setup.py -q build_ext --build-lib build/sanitize
	LD_PRELOAD="$(ASAN_LIBRARIES)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		DEBIASKD_LIBRARY_DIR=build/sanitize/debiaskd DEBIASKD_SANITIZE=1 TRITON_INTERPRET=0 PYTHONMALLOC=malloc HYPOTHESIS_PROFILE=few \
		$(PYTEST) -m "not compiles" -k "not eager and not gradcheck" $(SANITIZED)

# The libraries as built against the newest torch, run under the oldest one supported.
abi: $(VENV)/.dev $(OLD_VENV)/.done
	DEBIASKD_OLD_PYTHON=$(abspath $(OLD_VENV))/bin/python $(PYTEST) -k oldest tests/native/test_build.py

old-torch: $(OLD_VENV)/.done

# torchvision names the torch that it fits: asked for together, torch is downloaded once, and never again for the build.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install "torch>=2.10" torchvision numpy "setuptools>=77"

$(VENV)/.train: $(BIN)/python $(NATIVE)
	$(BIN)/pip install --no-build-isolation --editable ".[train]"
	touch $@

$(VENV)/.dev: $(BIN)/python $(NATIVE)
	$(BIN)/pip install --no-build-isolation --editable ".[dev]"
	touch $@ $(VENV)/.train

$(OLD_VENV)/.done:
	$(PYTHON) -m venv $(OLD_VENV)
	$(OLD_VENV)/bin/pip install --quiet torch==2.10.0 numpy "setuptools>=77"
	touch $@

clean:
	rm -rf build dist *.egg-info debiaskd/*.so debiaskd/build_record.json $(VENV) $(OLD_VENV)
