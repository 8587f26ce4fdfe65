# What people run. `make help` lists it. The work is in hack/, tests/ and Cargo.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
# Once only: make calls scripts that see to it themselves.
export PATH := $(PATH)$(if $(findstring :$(HOME)/.cargo/bin:,:$(PATH):),,:$(HOME)/.cargo/bin)

# Where `make test` keeps its cluster.
TEST_CLUSTER := target/test-cluster

.PHONY: help
help: ## List all targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: ## From a fresh Debian machine to a Ready bot; again: starts whichever part died
	@hack/demo up

.PHONY: demo-down
demo-down: ## Remove all that `make demo` made, its bots included
	@hack/demo down

.PHONY: test
test: ## Every test, on a cluster that it starts and stops; ARGS go to cargo test; CONTAINERD=1.7 or 2: not Debian's
	@hack/install-deps
	@BERTH_CONTAINERD=$(if $(CONTAINERD),$$(hack/containerd $(CONTAINERD))) hack/test $(ARGS)

.PHONY: test-down
test-down: ## Remove the cluster that a plain `cargo test` left for the next one
	@hack/cluster down $(TEST_CLUSTER)

.PHONY: fmt
fmt: ## Format the code
	@cargo fmt

.PHONY: lint
lint: ## Formatting, clippy, documentation, and shell scripts where shellcheck is there
	@cargo fmt --check
	@cargo clippy --locked --all-targets -- -D warnings
	@RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps --quiet
	@hack/lint-scripts

.PHONY: crds
crds: ## Write crds/ from the types in src/api
	@cargo run --locked --quiet -- crds --dir crds

.PHONY: deploy
deploy: ## Write deploy/base from the chart
	@hack/deploy

.PHONY: image
image: ## Build the image into target/image/berth.tar; ARGS="--push HOST:PORT/REPOSITORY:TAG" pushes it
	@hack/install-deps
	@images/berth/build $(ARGS)

.PHONY: sqlx
sqlx: ## Write .sqlx, sqlx's offline data, from the queries in src and from migrations/, on a PostgreSQL that it starts
	@hack/sqlx

.PHONY: docs
docs: ## Write docs/reasons.md and docs/costs.md from the tables in src
	@UPDATE=1 cargo test --locked --quiet --test docs page >/dev/null

.PHONY: bench
bench: ## Every figure beside its peer; writes target/bench/report.json; ARGS: some groups of them
	@hack/bench $(ARGS)

.PHONY: leaks
leaks: ## Count what bots leave on the machine: of the sourced env, else of the demo
	@if [[ -z $${BERTH_RUN:-} ]]; then . target/demo/env; fi; hack/leaks
