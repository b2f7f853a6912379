# Every target that needs the environment makes it first, in .venv, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
KERNELS := $(wildcard detpost/kernels/cpu/*.cpp detpost/kernels/cpu/*.h)

OLDEST := .venv-oldest
RAY := .venv-ray
NNCF := .venv-nncf

.PHONY: install demo test test-slow test-processors test-oldest test-oldest-fast test-ray test-nncf test-edge \
	web web-test lint docs bench clean

install: $(STAMP)

# Without bytecode: what is imported gets it then, and most of what the packages bring never is. The warning that is left
# out comes with every editable installation and asks for nothing.
$(STAMP): pyproject.toml setup.py constraints.txt $(KERNELS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS='ignore:Editable installation' \
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[all,dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/detpost demo

# Notebooks included; one thread in each, because the workers have the cores. A worker that has nothing left takes half of
# what another still has: no long file keeps one waiting at the end.
PYTEST := -m pytest -n auto --dist worksteal
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) --nbmake --nbmake-timeout=300 -m 'not slow'

# What takes a minute each: whole networks compiled and exported, runs that are killed, Triton's interpreter, memory.
test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m slow

# Once for each level of instructions and each form of the kernels that this machine has.
test-processors: $(STAMP)
	$(BIN)/python scripts/test_processors.py

# The oldest versions that pyproject.toml admits, in an environment of their own.
$(OLDEST)/.installed: pyproject.toml setup.py scripts/oldest_versions.py $(KERNELS)
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python scripts/oldest_versions.py > $(OLDEST)/oldest.txt
	PYTHONWARNINGS='ignore:Editable installation' \
	$(OLDEST)/bin/python -m pip install --quiet --no-compile -c $(OLDEST)/oldest.txt -e '.[all,dev]'
	touch $@

test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(PYTEST) --nbmake --nbmake-timeout=300

# ExecuTorch, LiteRT and Core ML, each with the PyTorch of its choice: environments of their own.
EDGE_RUNNERS := executorch litert coreml
EDGE_executorch := executorch torch torchvision
EDGE_litert := litert-torch ai-edge-litert torchvision
EDGE_coreml := coremltools torch torchvision

.venv-edge/%/.installed: pyproject.toml setup.py $(KERNELS)
	$(PYTHON) -m venv --clear .venv-edge/$*
	.venv-edge/$*/bin/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS='ignore:Editable installation' \
	.venv-edge/$*/bin/python -m pip install --quiet --no-compile $(EDGE_$*) pytest hypothesis -e '.[hf]'
	touch $@

test-edge: $(EDGE_RUNNERS:%=.venv-edge/%/.installed)
	for runner in $(EDGE_RUNNERS); do \
	OMP_NUM_THREADS=1 .venv-edge/$$runner/bin/python -m pytest -p no:cacheprovider tests/export/test_edge.py || exit 1; done

# What hangs on versions most, without what is slow or compiles: the numbers, the graphs, the command, the drop-ins.
OLDEST_FAST := tests/test_selection.py tests/test_postprocess.py tests/test_detections.py tests/test_nms.py tests/losses \
	tests/metrics tests/kernels/cpu tests/kernels/test_dispatch.py tests/export/test_decode_graph.py \
	tests/export/test_attach.py tests/command tests/integrations/test_kornia.py tests/integrations/test_errors.py
test-oldest-fast: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(PYTEST) -m 'not slow' \
		-k 'not (compile or dynamo or in_training or every_level or not_given)' $(OLDEST_FAST)

# Ray Data and DuckDB, in an environment that has all of .venv besides: 350 MB that few need.
$(RAY)/.installed: $(STAMP)
	$(PYTHON) -m venv --clear $(RAY)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > "$$($(RAY)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"
	$(RAY)/bin/python -m pip install --quiet --no-compile -c constraints.txt 'ray[data]>=2.50' 'aiohttp>=3.10' 'duckdb>=1.3'
	touch $@

# NNCF likewise.
$(NNCF)/.installed: $(STAMP)
	$(PYTHON) -m venv --clear $(NNCF)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > "$$($(NNCF)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"
	$(NNCF)/bin/python -m pip install --quiet --no-compile -c constraints.txt 'nncf>=2.18'
	touch $@

test-nncf: $(NNCF)/.installed
	$(NNCF)/bin/python -m pytest tests/runs/test_quantize_openvino.py

test-ray: $(RAY)/.installed
	OMP_NUM_THREADS=1 $(RAY)/bin/python -m pytest tests/runs/test_ray.py tests/runs/test_parquet.py

web_out/tiny.onnx: $(STAMP)
	$(BIN)/detpost export tiny -o $@

# The page of the shipped detector, on this machine until Ctrl-C; npm fetches ONNX Runtime Web once.
web: web_out/tiny.onnx
	$(BIN)/detpost web web_out/tiny.onnx -o web_out/page $(addprefix --example ,$(wildcard detpost/zoo/samples/*.png)) --serve

web/node_modules/.installed: web/package.json
	cd web && npm install --silent --no-package-lock --no-fund --no-audit
	touch $@

# The npm package in Node.js, the page in headless Chromium; both have to be there.
web-test: $(STAMP) web/node_modules/.installed
	$(BIN)/python scripts/browser.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile tests/web

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Into site/; without network or npm, the front page has a picture in place of the page that runs `tiny`. Open site/index.html.
docs: $(STAMP)
	$(BIN)/python scripts/docs_page.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# As a module, so that the baselines of tests/reference can be imported from here.
bench: $(STAMP)
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) $(OLDEST) $(RAY) $(NNCF) .venv-edge build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo_out bench_out site \
	  web_out web/dist web/node_modules
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
