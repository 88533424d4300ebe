# Every target runs in the environment that `pip install -e ".[dev]"` made; PYTHON=… chooses another interpreter.
PYTHON ?= python
# without a network the tests must fail at once where they would reach for one, not hang
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.DEFAULT_GOAL := help
.PHONY: help check lint types imports twins format test test-gpu bench docs site sync-twins wheel hub-kernel clean packages

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

check: lint types imports twins docs  ## all checks that run no test: style, types, import direction, twins, links

lint:  ## style and format of the code (ruff)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types: packages  ## types (mypy)
	$(PYTHON) -m mypy

imports: packages  ## direction of imports between packages (import-linter)
	PYTHONPATH=build/packages $(PYTHON) -c 'import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))'

twins:  ## modeling_based/ holds the same plain PyTorch twins as the kernels' folder
	$(PYTHON) scripts/sync_twins.py --check

sync-twins:  ## copy the twins from the kernels' folder to modeling_based/
	$(PYTHON) scripts/sync_twins.py

format:  ## format the code and sort imports
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

test:  ## the tests, on the CPU (kernels run in Triton's interpreter); ARGS=… goes to pytest
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile $(ARGS)

test-gpu:  ## kernel and model tests on a CUDA device, one process
	$(PYTHON) -m pytest -m "gpu or not gpu" tests/kernels tests/modeling_based $(ARGS)

BENCHMARKS = attention_kernels decode generation training
bench:  ## run every benchmark on this GPU and write benchmarks/results/<gpu>/; ARGS=--quick for few sizes
	@for name in $(BENCHMARKS); do echo "== $$name"; $(PYTHON) benchmarks/$$name.py $(ARGS) || exit 1; done

docs:  ## check the links of all Markdown files
	$(PYTHON) scripts/check_links.py

site: packages  ## build the documentation's pages into site/; they open without a network
	NO_MKDOCS_2_WARNING=true $(PYTHON) -m mkdocs build --strict

wheel:  ## build dist/*.whl and dist/*.tar.gz
	rm -rf build dist
	$(PYTHON) -m build

hub-kernel:  ## lay the kernels out for upload to the Hub, under build/geobased-kernels
	$(PYTHON) scripts/build_hub_kernel.py

packages:
	@$(PYTHON) scripts/link_packages.py

clean:  ## remove what builds, tests and tools left behind
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis geobased.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
