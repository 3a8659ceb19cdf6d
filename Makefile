PYTHON ?= python3
SERVE  := .venv
DEV    := .venv-dev
GPU    := .venv-gpu
POLICY := .venv-policy
MODEL  ?= digit
PORT   ?= 3000
VARIANT ?= cpu
ENGINE ?= docker

.DEFAULT_GOAL := help
.PHONY: help serve test check format train export bench peers tune bento image up down policy proto lock clean

help:            ## this list
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+:  *##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

# Two environments: what is served stays free of torch, whatever else is installed beside it.
$(SERVE)/.ready: requirements/serve.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Quintet needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/pip install --quiet --disable-pip-version-check -r requirements/serve.txt
	@touch $@

$(DEV)/.ready: requirements/dev.txt clients/python/pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Quintet needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	$(DEV)/bin/pip install --quiet --disable-pip-version-check --no-deps -e clients/python
	@touch $@

serve: $(SERVE)/.ready  ## all shipped models on REST :3000 and gRPC :3001
	BENTOML_DO_NOT_TRACK=True exec $(SERVE)/bin/bentoml serve service:Quintet --port $(PORT)

test: $(DEV)/.ready     ## the whole suite
	$(DEV)/bin/pytest

check: $(DEV)/.ready    ## what CI runs: formatter, linter, types, tests
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/ruff check .
	$(DEV)/bin/mypy
	$(DEV)/bin/pytest

format: $(DEV)/.ready   ## put the code in its house style
	$(DEV)/bin/ruff check --fix --quiet .
	$(DEV)/bin/ruff format .

train: $(DEV)/.ready    ## train one: make train MODEL=digit
	$(DEV)/bin/python -m training $(MODEL)

export: $(DEV)/.ready   ## export it with proof into models/
	$(DEV)/bin/python -m export $(MODEL)

# As the development environment, but with the ONNX Runtime that has CUDA, which takes the other's place.
$(GPU)/.ready: requirements/dev.txt clients/python/pyproject.toml
	$(PYTHON) -m venv $(GPU)
	sed 's/^onnxruntime==/onnxruntime-gpu[cuda,cudnn]==/' requirements/dev.txt > $(GPU)/requirements.txt
	$(GPU)/bin/pip install --quiet --disable-pip-version-check -r $(GPU)/requirements.txt
	$(GPU)/bin/pip install --quiet --disable-pip-version-check --no-deps -e clients/python
	@touch $@

ifeq ($(VARIANT),gpu)
bench: $(GPU)/.ready    ## the load tests, beside the peers; VARIANT=gpu: ours and its limit on a GPU
	QUINTET_RUNTIME=cuda $(GPU)/bin/python -m load_tests --name gpu --servers quintet,onnxruntime,'decode and answer'
else
bench: $(DEV)/.ready
	$(DEV)/bin/python -m load_tests
endif

peers: $(DEV)/.ready    ## the peers' environments, for make bench; two gigabytes
	$(DEV)/bin/python -m load_tests peers install

tune: $(DEV)/.ready     ## find the best settings for this machine
	$(DEV)/bin/python -m load_tests tune

bento: $(SERVE)/.ready  ## the built Bento
	BENTOML_DO_NOT_TRACK=True $(SERVE)/bin/bentoml build

# Where there is no Docker engine: `make image ENGINE=buildah`, and see deploy/container/base.sh for BASE.
# buildah would else write OCI's form of an image, which has no place for a health check.
image:           ## the container image: make image VARIANT=cpu, or gpu
	$(ENGINE) build $(if $(filter %buildah %podman,$(ENGINE)),--format docker) --tag quintet:$(VARIANT) \
	  --file deploy/container/Dockerfile --build-arg VARIANT=$(VARIANT) \
	  $(if $(BASE),--build-arg BASE=$(BASE)) $(IMAGE_OPTIONS) .

$(POLICY)/.ready: requirements/policy.txt
	$(PYTHON) -m venv $(POLICY)
	$(POLICY)/bin/pip install --quiet --disable-pip-version-check -r requirements/policy.txt
	@touch $@

policy: $(POLICY)/.ready  ## checkov, for the tests of deploy/; they are skipped without it

COMPOSE = VARIANT=$(VARIANT) $(ENGINE) compose --file deploy/compose.yaml \
  $(if $(filter gpu,$(VARIANT)),--file deploy/compose.gpu.yaml)

up: image        ## service, Prometheus and Grafana by compose; its ports: deploy/compose.yaml
	export GRAFANA_PASSWORD=$${GRAFANA_PASSWORD:-$$($(PYTHON) -c 'import secrets; print(secrets.token_urlsafe(12))')}; \
	  $(COMPOSE) up --detach --wait && echo "Grafana: http://localhost:$${GRAFANA_PORT:-3002}, admin, $$GRAFANA_PASSWORD"

down:            ## stop them; what Prometheus stored stays
	GRAFANA_PASSWORD=none $(COMPOSE) down

proto: $(DEV)/.ready    ## generate the gRPC messages anew
	$(DEV)/bin/python -m service.proto service/proto clients/python/src/quintet_client

# Fresh environments, so that nothing which merely happens to be installed gets into a lock.
lock:            ## pin the newest versions that pyproject.toml allows
	rm -rf build/lock && mkdir -p build/lock
	$(PYTHON) -m venv build/lock/serve
	build/lock/serve/bin/pip install --quiet '.[serve]'
	build/lock/serve/bin/pip freeze --exclude quintet > requirements/serve.txt
	$(PYTHON) -m venv build/lock/dev
	build/lock/dev/bin/pip install --quiet -c requirements/serve.txt '.[serve,training,dev]' ./clients/python
	build/lock/dev/bin/pip freeze --exclude quintet --exclude quintet-client | sed 's/+cpu$$//' > requirements/dev.txt
	build/lock/dev/bin/pip install --quiet uv
	for variant in cpu gpu; do \
	  sed "$$([ $$variant = cpu ] || echo 's/^onnxruntime==/onnxruntime-gpu[cuda,cudnn]==/')" requirements/serve.txt \
	    > build/lock/$$variant.in; \
	  $(HASH) build/lock/$$variant.in --output-file requirements/image-$$variant.txt; \
	done
	$(HASH) --extra image pyproject.toml --output-file requirements/image-tools.txt
	rm -rf build/lock

# What goes into the image is named by its hash; both variants have the versions of serve.txt.
HASH = build/lock/dev/bin/uv pip compile --quiet --no-header --no-annotate --generate-hashes \
  --python-version 3.11 --python-platform x86_64-manylinux_2_28

clean:           ## remove the environments and caches
	rm -rf $(SERVE) $(DEV) $(GPU) $(POLICY) build .mypy_cache .pytest_cache .ruff_cache
