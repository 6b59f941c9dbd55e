# Two commands: `make tutorial` runs the course, `make test` checks it. Both make .venv first, once.
# Another Python: `make PYTHON=python3.12 tutorial`.  One room's tests: `make test TESTS=tests/test_packaging.py`.

TESTS ?=
PYTEST_ARGS ?= -n logical --maxprocesses 4
# Nothing may reach for a hub once the packages are installed. The tests download from a server of their own on
# loopback, which offline mode would forbid, so there the hub's address is one where nobody answers.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# One process a core, so one thread a process.
SUITE := HF_ENDPOINT=http://127.0.0.1:9 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help tutorial test test-oldest test-newest test-peers notebooks zh grown rehearsal clean

help:
	@echo "make tutorial     run notebooks 01 to 06 on the tiny checkpoint, on the CPU -> build/tutorial/"
	@echo "make grown        the same on a checkpoint of other sizes, as if it were the real one: every branch for it"
	@echo "make rehearsal    the same at full size on GPUs that look like T4s, two and one (needs CUDA, 45 GB of disk)"
	@echo "make test         lint and the whole suite, newest supported packages"
	@echo "make test-oldest  the suite on the oldest supported packages"
	@echo "make test-newest  the suite on the newest packages that the ranges give today, without pins (torch stays)"
	@echo "make test-peers   the tests of transformers and peft with our model (needs the package registry)"
	@echo "make notebooks    rewrite the committed notebooks with fresh outputs"
	@echo "make zh           the Chinese edition from the English one and the translations in locale/"
	@echo "make clean        remove everything that these commands made"

tutorial: .venv/.installed
	@$(OFFLINE) .venv/bin/python scripts/run_tutorial.py

notebooks: .venv/.installed
	@fc-list :lang=zh family 2>/dev/null | grep -q . \
		|| echo "No font here has Chinese glyphs: the Chinese edition will have English figures. apt-get install fonts-noto-cjk"
	@$(OFFLINE) .venv/bin/python scripts/run_tutorial.py --write

zh: .venv/.installed
	@.venv/bin/python scripts/chinese_edition.py --update
	@.venv/bin/python scripts/chinese_edition.py
	@.venv/bin/python scripts/chinese_edition.py --check

# Small enough for a CPU, and answers as the tiny checkpoint does.
grown: .venv/.installed build/grown/weights/config.json
	@$(OFFLINE) .venv/bin/python scripts/run_tutorial.py --weights build/grown/weights --build build/grown/tutorial

build/grown/weights/config.json: scripts/grow_checkpoint.py data/tiny-chatglm/weights_manifest.json | .venv/.installed
	@rm -rf build/grown/weights
	@$(OFFLINE) .venv/bin/python scripts/grow_checkpoint.py build/grown/weights --hidden-size 512 --heads 8 --layers 12 \
		--inner-hidden-size 512 --vocab-size 2528

rehearsal: .venv/.installed
	@.venv/bin/python benchmarks/rehearsal.py

test: .venv/.installed
	@mkdir -p build
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports >build/imports.txt || { cat build/imports.txt; exit 1; }
	.venv/bin/mypy
	$(SUITE) .venv/bin/python -m pytest $(PYTEST_ARGS) $(TESTS)

# What is marked "once" tests our own programs and files at length, not what packages changed: killed savers, launched
# processes, benchmarks, the clouds, long searches for faults of readers and planner.
test-oldest: .venv-oldest/.installed .venv-lab3/.installed
	$(SUITE) GLM_LAB3=.venv-lab3 .venv-oldest/bin/python -m pytest $(PYTEST_ARGS) -m "not once" $(TESTS)

# Installed anew each time, since the newest of today is another tomorrow. torch is the one of the pins: no other build
# of some GB is fetched for this. Where nothing of pyproject.toml is newer than the pins, `make test` was this test.
test-newest:
	@mkdir -p build && grep "^torch==" constraints.txt >build/torch.txt
	@PYTHON="$(PYTHON)" sh scripts/make_venv.sh .venv-newest build/torch.txt --upgrade
	$(SUITE) .venv-newest/bin/python -m pytest $(PYTEST_ARGS) -m "not once" $$(.venv-newest/bin/python scripts/newest.py $(TESTS))

# Their tests have markers of their own, so those are not looked at.
test-peers: .venv/.installed
	.venv/bin/python tests/peers/fetch.py build/peers
	GLM_PEERS=1 $(SUITE) .venv/bin/python -m pytest -o addopts="-q --import-mode=importlib" -W ignore $(PYTEST_ARGS) \
		$(or $(TESTS),tests/peers)

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-lab3 build .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is younger than its sources after an installation, so a second run installs nothing.
.venv/.installed: constraints.txt pyproject.toml scripts/make_venv.sh
	@PYTHON="$(PYTHON)" sh scripts/make_venv.sh .venv constraints.txt

.venv-oldest/.installed: constraints-oldest.txt pyproject.toml scripts/make_venv.sh
	@PYTHON="$(PYTHON)" sh scripts/make_venv.sh .venv-oldest constraints-oldest.txt

# ipywidgets 7 belongs to JupyterLab 3, which does not go with the other packages: an environment of its own, for the
# browser tests alone. Where it cannot be made (it has no wheels for the newest Pythons), those tests are skipped.
.venv-lab3/.installed: constraints-lab3.txt
	@$(or $(PYTHON),python3) -m venv .venv-lab3 \
		&& .venv-lab3/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lab3.txt jupyterlab ipywidgets \
		&& touch $@ || echo "No JupyterLab 3 here: the browser tests of ipywidgets 7 will be skipped."
