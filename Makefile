# Thin: what each target does is in scripts/. `make help` lists them.
.DEFAULT_GOAL := help
.PHONY: help setup build demo test test-mesh parity interop bench bench-trl lint doc site keys check gpu-check package image image-check install clean

# FEATURES=mpi: with collectives over MPI, which take an MPI to build (scripts/mpi.sh).
features := $(if $(FEATURES),--features $(FEATURES))

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: ## libtorch 2.11.0 into .libtorch/; says what is missing on this machine
	@scripts/doctor.sh cargo disk
	@scripts/setup.sh

build: setup ## the binaries, target/release/{corral,launch}
	cargo build --release $(features)

demo: ## make data, train a tokenizer, pretrain on two ranks, print what the model writes
	@scripts/demo.sh

test: setup ## all tests; then those of operations and models once more, on the GPU's kernels, emulated
	cargo test --release $(features)
	CORRAL_TEST_DEVICE=emulated cargo test --release $(features) --test ops --test quant --test parity --test parity_training --test generate

parity: setup ## only the tests against golden data (CORRAL_GOLDEN=DIR: another set of it)
	cargo test --release --test parity --test parity_training --test tokenizer
	cargo test --release --test dpo --test kto trls
	cargo test --release --lib algorithms::

test-mesh: setup ## models over ranks in every combination (`make test` has a selection)
	CORRAL_MESH_ALL=1 cargo test --release --test mesh

interop: build ## the files we write, read by transformers, safetensors and TensorBoard
	@scripts/interop.sh
	.interop/bin/python -m pytest -q tests/interop

bench: build ## training speed and memory against PyTorch (ARGS="--presets llama-15m --rounds 3")
	@scripts/interop.sh
	.interop/bin/python scripts/bench.py $(ARGS)

bench-trl: build ## seconds a step of DPO, GRPO and PPO against TRL (PYTHON=one with TRL, ARGS="--ppo FOLDER": docs/benchmarks.md)
	$(or $(PYTHON),python3) scripts/bench_trl.py $(ARGS)

lint: setup ## format, dependencies, spelling (scripts/lint.sh), clippy
	@scripts/doctor.sh lint
	@scripts/lint.sh
	cargo clippy --release --all-targets --locked $(features) -- -D warnings

doc: setup ## the code's documentation, private items too, target/doc/
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" cargo doc --release --no-deps --document-private-items --locked

site: ## docs/ as a searchable site, target/site/
	scripts/site.sh

check: lint doc site test interop ## all that CI checks

keys: build ## docs/config.md, docs/names.md and docs/corral.schema.json, made of the keys that the program knows
	target/release/corral help --markdown >docs/config.md
	target/release/corral help --foreign >docs/names.md
	target/release/corral help --schema >docs/corral.schema.json

gpu-check: ## correctness and speed on a GPU, in stages (docs/gpu.md)
	@scripts/gpu_check.sh

package: setup ## binaries, libtorch and configs in one folder that can be moved (DIR=..., default dist/corral)
	cargo build --profile dist --locked $(features)
	scripts/package.sh $(or $(DIR),dist/corral)

image: ## the Docker image corral; where no registry is reached, scripts/docker_bases.sh comes first (NETWORK=host)
	docker build --network $(or $(NETWORK),default) --tag corral .

image-check: ## runs that image on the CPU: ranks, two containers as two nodes, a lost one, a stopped one
	scripts/docker_check.sh

install: build ## corral and launch in ~/.local/bin (PREFIX=...), with completions and man pages
	scripts/install.sh

clean: ## the build (libtorch stays: `rm -rf .libtorch` removes it)
	rm -rf target .interop dist gpu-check gpu-check.tar.gz
