# make faces       1000 generated faces and a contact sheet, with a light install
# make gallery     the embedded faces in a browser, made by this machine and, where npm is, by the browser itself
# make browser     what browsers need to make pictures themselves, for serve-vae --http --share-models
# make test        the whole test suite
# make check       format, lint, types, import arrows, wire contracts: what CI and pre-commit run
# make bench       measure what docs/benchmarks.md shows, in a quarter of an hour on two quiet cores
# make bench-full  the same, in more and longer rounds and larger batches; with TORCH=PYTHON both try torch as well
# make bench-scale what docs/scale.md shows, in an hour
# make protos      generate the stubs in serve/stubs
# make lock        renew requirements.lock

PYTHON ?= python3
BIN := .venv/bin
BENCH := $(BIN)/python benchmarks
FIGURES := docs/benchmarks
STUBS := sampling/v1/sampling.proto admin/v1/admin.proto onnx/v1/model.proto inference.proto

.PHONY: faces gallery browser test check bench bench-full bench-scale format protos lock clean

faces: .venv/light
	$(BIN)/sample-cli --n 1000 --out faces/ --grid

gallery: .venv/gallery
	@$(BROWSER)
	$(BIN)/serve-vae --model serve/bundles/faces.onnx --model serve/bundles/faces-int8.onnx \
	  --listen 127.0.0.1:0 --http 127.0.0.1:8480 --share-models --open

# ONNX Runtime for browsers, of the version and with the hashes in the lock file.
ORT := serve/server/http/ort
ORT_FILES := ort-wasm-simd-threaded.mjs ort-wasm-simd-threaded.wasm ort.webgpu.min.mjs \
  ort-wasm-simd-threaded.asyncify.mjs ort-wasm-simd-threaded.asyncify.wasm ort.wasm.min.mjs

# For what does without, where npm is not there or its registry cannot be reached.
BROWSER := $(if $(shell command -v npm),$(MAKE) --no-print-directory browser \
  || echo "ONNX Runtime for browsers cannot be installed: pages show the server's pictures alone",true)

browser: $(ORT)/ort.wasm.min.mjs.gz

# The last of them is there once all are.
$(ORT)/ort.wasm.min.mjs.gz: $(ORT)/package-lock.json
	npm ci --prefix $(ORT) --ignore-scripts --no-audit --no-fund --loglevel=error
	for file in $(ORT_FILES); do \
	  gzip --best --stdout $(ORT)/node_modules/onnxruntime-web/dist/$$file > $(ORT)/$$file.gz.part \
	  && mv $(ORT)/$$file.gz.part $(ORT)/$$file.gz || exit 1; done
	rm -r $(ORT)/node_modules

test: .venv/full
	@$(BROWSER)
	$(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

check: .venv/full
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf breaking --against tests/data/protos-0.1.0.binpb

CHROMIUM := $(shell command -v chromium)
bench: LENGTH := --rounds 3
bench: LOAD := --seconds 0.5
bench: BATCHES := --batch 1 --batch 64
bench: SIZES := --points 4
bench-full: LENGTH := --rounds 9
bench-full: LOAD := --seconds 4
bench-full: COMPILE := --compile

# CelebA's chain is converted once: sampling.py takes the models that exporter.py keeps.
bench bench-full: .venv/full
	$(BENCH)/exporter.py $(LENGTH) --batch 64 --keep .venv/celeba --json $(FIGURES)/exporter.json
	$(BENCH)/sampling.py $(LENGTH) $(BATCHES) --recipe celeba --keep .venv/celeba $(TORCH:%=--torch %) --json $(FIGURES)/sampling-celeba.json
	$(BENCH)/sampling.py $(LENGTH) $(BATCHES) --recipe faces $(TORCH:%=--torch %) --json $(FIGURES)/sampling-faces.json
	$(BENCH)/sample.py $(LENGTH) --json $(FIGURES)/sample.json
	$(BENCH)/server.py $(LENGTH) $(LOAD) --json $(FIGURES)/server.json
	$(BENCH)/doors.py $(LENGTH) $(LOAD) --device cpu $(CHROMIUM:%=--chromium %) --json $(FIGURES)/doors.json
	$(BENCH)/start.py $(LENGTH) --json $(FIGURES)/start.json
	$(BENCH)/encode.py $(LENGTH) --device cpu --json $(FIGURES)/encode.json
	$(BENCH)/growth.py $(SIZES) --plot docs/growth.png --json $(FIGURES)/growth.json
	$(BENCH)/train.py --rounds 5 --steps 3 --try base_dim=16,batch=50 $(TORCH:%=--torch %) $(COMPILE) --json $(FIGURES)/train.json
	$(BENCH)/second_stage.py $(LENGTH) --json $(FIGURES)/second_stage.json
	$(BENCH)/render.py

bench-scale: .venv/full
	$(BENCH)/cluster.py --json $(FIGURES)/cluster.json
	$(BENCH)/exporter.py --recipe smoke --rounds 1 --batch 4 --keep .venv/smoke
	$(BENCH)/cluster.py --model .venv/smoke/fp32.onnx --count 100000 --count 1000000 --json $(FIGURES)/cluster-small.json
	$(BENCH)/render.py

format: .venv/full
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The virtual paths make the stubs import each other as serve.stubs.*.
protos: .venv/full
	$(BIN)/python -m grpc_tools.protoc -Iserve/stubs=protos/balancedvae -Iserve/stubs=protos/inference \
	  --python_out=. --pyi_out=. --grpc_python_out=. $(STUBS:%=serve/stubs/%)
	rm serve/stubs/onnx/v1/model_pb2_grpc.py

# All extras but torch, which pins other versions of NVIDIA's libraries than onnxruntime-gpu takes.
LOCKED := cpu gpu openvino bulk ray http show otel jax jax-gpu heif tensorboard export test dev

lock: .venv/full
	$(BIN)/uv pip compile pyproject.toml $(LOCKED:%=--extra %) --python-version 3.11 --upgrade --quiet \
	  --no-annotate --no-header --no-emit-index-url --no-emit-find-links -o requirements.lock

clean:
	rm -rf .venv faces

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "Python 3.11 to 3.13 is needed, as of TensorFlow: make PYTHON=python3.13")'
	$(PYTHON) -m venv .venv

.venv/light: .venv/bin/python pyproject.toml requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[cpu]'
	touch $@

.venv/gallery: .venv/bin/python pyproject.toml requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[cpu,http]'
	touch $@

.venv/uv: .venv/bin/python requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock uv
	touch $@

# By uv, which takes a tenth of pip's minutes for so many packages.
.venv/full: .venv/uv pyproject.toml requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --quiet --compile-bytecode -c requirements.lock -e '.[cpu,export,test,dev]'
	touch $@
