# bitatlas. `make run` and `make test` need Python 3.11+ and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VIEW := build/typing/bitatlas
MODEL ?=
PORT ?= 8501

.PHONY: run test test-fast check lint types walls smollm2 smollm2-moe clean gpu clients

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,browser]'
	touch $@

$(VIEW): $(STAMP)
	mkdir -p $@
	for d in app analysis solvers kernels cache; do ln -sfn ../../../$$d $@/$$d; done

run: $(STAMP)
	$(BIN)/bitatlas serve --port $(PORT) $(MODEL)

test: $(STAMP)
	$(BIN)/python tests/browser/ensure_chromium.py
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup

# What starts processes, whole pages, running models or the Triton interpreter is left to `make test`.
FAST = $(addprefix --ignore=tests/,cli jobs app/screens app/targets examples analysis/metrics analysis/kv kernels/kv cache/test_crash.py test_how_to_add.py) \
	--ignore-glob='tests/kernels/test_triton*' --ignore-glob='tests/kernels/test_packed*' --ignore-glob='tests/app/test_*'

test-fast: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 -m "not slow and not browser" tests $(FAST)

check: lint types walls

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VIEW)
	$(BIN)/mypy -p bitatlas
	$(BIN)/python tests/planted_error.py

walls: $(VIEW)
	PYTHONPATH=build/typing $(BIN)/lint-imports

smollm2: $(STAMP)
	$(BIN)/python examples/smollm2.py models/smollm2

smollm2-moe: smollm2
	$(BIN)/python examples/smollm2_moe.py models/smollm2 models/smollm2-moe

# Engines that read what we export, each in an environment of its own beside ours, so that torch is not replaced.
clients: $(STAMP)
	for c in mlx:'mlx[cpu]__mlx-lm' llamacpp:llama-cpp-python torchao:torchao autoround:auto-round gptqmodel:gptqmodel; do \
	  d=.clients/$${c%%:*}; test -x $$d/bin/python || $(PYTHON) -m venv $$d; \
	  $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$($$d/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth; \
	  $$d/bin/pip install -q -c constraints.txt $$(echo $${c#*:} | sed 's/__/ /'); \
	done
	$(BIN)/python -m pytest -q tests/app/targets/test_engines.py

gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu_kernels.py --check
	$(BIN)/python -m pytest -q -m gpu
	$(BIN)/python benchmarks/gpu_kernels.py --tune

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
