#!/usr/bin/env bash
# Write the two lock files anew: every version pinned and hashed, no package index named. Needs `uv` (pip install uv).
set -euo pipefail
cd "$(dirname "$0")/.."
lock() { uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
    --override requirements/overrides.txt "$@"; }
lock pyproject.toml requirements/build.in -o requirements/install.lock
lock pyproject.toml requirements/dev.in -c requirements/install.lock -o requirements/dev.lock
# The peers that `make bench-engine` compares with: a virtual environment and a lock each, torch apart.
for peer in sentence-transformers fastembed infinity vllm-router litellm client clients clients-older engines snippets; do
    uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
        --override requirements/bench/overrides.txt "requirements/bench/$peer.in" -o "requirements/bench/$peer.lock"
done
