# setup    installs the packages that are missing (Debian: LLVM and MLIR 22)
# build    builds the command line, optimised
# models   fetches the two models of the demo into models/
# demo     compiles a model with an adapter, generates with and without, embeds three sentences
# test     formatting, lints and all tests
# test-gpu-full  every fixture's GPU code in the simulator, and code for models of many sizes through ptxas, on both chips
# gpu-bundle  builds target/gpu-bundle, the folder that is carried to a GPU machine; its run.sh checks and measures there
# test-gpu-bundle  runs a small bundle without a GPU; PYTHON names a python with torch, peft and transformers
# bench    measures against PyTorch + transformers + PEFT in the same run
# bench-methods  measures every adapter method against LoRA and against PEFT's own implementation
#
# CARGO_TARGET_DIR moves the build folder; MLIR_SYS_220_PREFIX names another LLVM 22; PYTHON another python3.

PYTHON ?= python3
TARGET := $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),target)
export PLEACH := $(TARGET)/release/pleach

.NOTPARALLEL:
.PHONY: setup build models demo test test-gpu-full bench bench-methods gpu-bundle test-gpu-bundle

setup:
	@bash scripts/setup.sh

build: setup
	cargo build --release -p pleach

models: setup
	@$(PYTHON) scripts/fetch_models.py

demo: build models
	@bash demo/run.sh

# Tests that need ptxas, a fetched model or a browser skip visibly where it could not be fetched.
test: setup
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --features pleach-tests/llvm -- -D warnings
	@bash scripts/setup_chromium.sh || echo "Chromium could not be installed: the tests of the page are skipped" >&2
	@$(PYTHON) scripts/fetch_models.py || echo "the models could not be fetched: their tests are skipped" >&2
	@ptxas=$$($(PYTHON) scripts/fetch_ptxas.py) && export PLEACH_PTXAS="$$ptxas" || \
	    echo "ptxas could not be fetched: its tests are skipped" >&2; \
	set -x; cargo test --workspace --features pleach-tests/llvm

# The sweep is of little use without ptxas.
test-gpu-full: setup
	@ptxas=$$($(PYTHON) scripts/fetch_ptxas.py) || exit 1; export PLEACH_PTXAS="$$ptxas"; set -ex; \
	PLEACH_GPU_FULL=1 cargo test --workspace --features pleach-tests/llvm --test trials -- gpu_ --nocapture; \
	cargo test --workspace --features pleach-tests/llvm --test all -- gpu:: --ignored --nocapture

bench: build models
	@bash benches/run.sh

bench-methods: build models
	@BENCH=methods.py bash benches/run.sh

gpu-bundle: build
	cargo build --release -p pleach-runtime --example measure
	@MEASURE=$(TARGET)/release/examples/measure PYTHON=$(PYTHON) bash benches/gpu/build.sh target/gpu-bundle

test-gpu-bundle: setup
	@PYTHON=$(PYTHON) bash benches/gpu/test.sh
