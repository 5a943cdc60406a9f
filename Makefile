# make demo     from a clean clone to scored photographs; IMAGES=<folder or s3:// prefix> scores one's own,
#               MODEL=<folder> with another model
# make test     the everyday tests; make check: what CI runs, that is lint, types and the slow tests too;
#               make long: what takes longer still: a lost node, two drivers, every panel and alert, a deployment
# make monitor  Prometheus on http://127.0.0.1:9090, with the alerts of deploy/prometheus: it watches the Ray that was
#               started last on this machine, that of a `make demo` beside it for one; MONITOR=<host:port> elsewhere
# make rehearse a deployment in small: store, Ray of two nodes, Prometheus; a submitted job scores two photographs
# make gpu      on a bare machine with an NVIDIA GPU and PyTorch, without network or installation: checks, speed and a
#               training, into OUT; DEVICE=cpu STEPS=2 is a dry run. `make gpu-data IDRID=... GRADES=...` packs what it
#               trains on
# make clean    removes what these targets made, .venv included
# Everything is installed into .venv on first use, and again when pyproject.toml changes.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo demo-sample demo-own test lint check long monitor clean rehearse gpu gpu-data

PYTHON ?= python3
BIN := .venv/bin
TORCH := torch==2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
IMAGES ?=
MODEL ?= lite
DEVICE ?= cuda
STEPS ?=
OUT ?= runs/gpu
GPU_DATA ?= runs/gpu-data
MONITOR ?= 127.0.0.1:9090

demo: $(if $(IMAGES),demo-own,demo-sample)
	@echo
	@echo "overlays       demo/results/overlays/"
	@echo "masks          demo/results/masks/"
	@echo "outcome table  demo/results/outcomes/   (Parquet)"

demo-sample: .venv/.installed
	rm -rf demo/archive demo/results
	$(BIN)/ma-cluster sample demo/archive --images 4
	$(BIN)/ma-cluster score "demo/archive/A. Segmentation/1. Original Images" demo/results --model "$(MODEL)"
	$(BIN)/ma-cluster status demo/results --truth demo/archive

# Exit status 3 says that some photographs were refused: of one's own folder that is an answer, not an error.
demo-own: .venv/.installed
	rm -rf demo/results
	$(BIN)/ma-cluster score "$(IMAGES)" demo/results --model "$(MODEL)" || [ $$? -eq 3 ]
	$(BIN)/ma-cluster status demo/results

test: .venv/.installed-test
	$(BIN)/pytest -m "not slow and not long"

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

rehearse: .venv/.installed-test
	deploy/local/rehearse.sh

check: lint
	$(BIN)/pytest -m "not long"

long: .venv/.installed-test
	$(BIN)/pytest -m long

gpu:
	$(PYTHON) tests/gpu/prove.py --device "$(DEVICE)" $(if $(STEPS),--steps $(STEPS)) --data "$(GPU_DATA)" --out "$(OUT)"

gpu-data: .venv/.installed
	$(BIN)/python tests/gpu/pack.py pack --idrid "$(IDRID)" $(if $(GRADES),--grades "$(GRADES)") --out "$(GPU_DATA)"

monitor:
	@command -v prometheus >/dev/null || { echo "no prometheus on the PATH: apt-get install prometheus," \
	  "brew install prometheus or https://prometheus.io/download; without one: ma-cluster top" >&2; exit 1; }
	@echo "http://$(MONITOR)   alerts: http://$(MONITOR)/alerts   in a terminal: ma-cluster top --prometheus http://$(MONITOR)"
	@mkdir -p demo
	prometheus --config.file=deploy/prometheus/prometheus.yml --storage.tsdb.path=demo/prometheus \
	  --web.listen-address="$(MONITOR)" --log.level=warn

clean:
	rm -rf .venv demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find ma_cluster jobs tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: .venv/.torch pyproject.toml
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/.installed-test: .venv/.torch pyproject.toml
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@ .venv/.installed

# PyPI's torch for Linux brings gigabytes of CUDA. Where there is no NVIDIA GPU, PyTorch's own index of CPU builds is
# asked first; it gets 15 seconds to answer, and where it cannot be reached PyPI's build will do. A torch that is in
# .venv already stays.
.venv/.torch:
	@echo "installing into .venv; the first time takes some minutes"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	if $(BIN)/python -c 'import torch' 2>/dev/null; then :; \
	elif [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null \
	  && timeout 15 $(BIN)/python -c 'from urllib.request import urlopen; urlopen("$(TORCH_CPU_INDEX)/torch/", timeout=10)' 2>/dev/null \
	  && $(BIN)/pip install --quiet --extra-index-url $(TORCH_CPU_INDEX) '$(TORCH)'; \
	then :; else $(BIN)/pip install --quiet '$(TORCH)'; fi
	touch $@
