# The tasks a person runs. Everything is also plain cargo; this file only sets up what is missing first.
CARGO ?= cargo
DEVICE ?= auto

.PHONY: help demo test lint bench peers docs vulkan nvrtc mpi gpu-bundle rust

help:
	@echo "make demo    train, compress, fine-tune and report on the embedded corpus (CPU or GPU, about 10 minutes)"
	@echo "make test    all tests; installs the software Vulkan driver and MPI where none is found, fetches the CUDA compiler"
	@echo "make lint    formatting and clippy, warnings denied"
	@echo "make bench   kernel benchmarks (criterion) over the table's real model sizes"
	@echo "make peers   the same work in other libraries on this machine, in turn: writes docs/benchmarks.md (an hour the first time)"
	@echo "make docs    regenerate the support table"
	@echo "make gpu-bundle    pack what a GPU machine without toolchain and network needs (target/gpu-bundle)"

rust:
	@command -v $(CARGO) >/dev/null || { echo "A Rust toolchain (1.92 or newer) is needed: see https://rustup.rs"; exit 1; }

# A Vulkan driver for the WGSL kernels: the software one of Mesa, where none is installed.
vulkan:
	@sh scripts/vulkan.sh

# The compiler of the CUDA kernels, for checks that need no GPU.
nvrtc:
	@sh scripts/nvrtc.sh

# MPI, for pipelines across processes (cargo feature `mpi`).
mpi:
	@sh scripts/mpi.sh

demo: rust
	$(CARGO) run --release -- run --device $(DEVICE)

test: rust vulkan nvrtc mpi
	ESPALIER_REQUIRE=wgpu,cuda-host,nvrtc,mpi $(CARGO) test --workspace --features mpi --no-fail-fast

lint: rust mpi
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets --features mpi -- -D warnings

bench: rust
	$(CARGO) bench

# Ours and whatever other libraries can be built or installed here: see scripts/peers.sh.
peers: rust
	CARGO=$(CARGO) sh scripts/peers.sh

docs: rust
	CARGO=$(CARGO) sh scripts/support.sh

# Checks, times and compares on a machine that has a GPU and nothing else: see scripts/gpu_run.sh.
gpu-bundle: rust
	CARGO=$(CARGO) sh scripts/gpu_bundle.sh
