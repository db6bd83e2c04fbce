#!/bin/sh
# Take out of a virtual environment (argument 1) what embedmesh never loads, strip what is left, and compile it: the
# image is read-only, so that nothing could be compiled later.
set -eu
venv=$1
packages=$(echo "$venv"/lib/python3*/site-packages)
python="$venv/bin/python"

# What only building needed, and pip.
"$venv/bin/pip" uninstall --yes --quiet --disable-pip-version-check \
    hatchling editables trove-classifiers pluggy pathspec tomlkit
"$venv/bin/pip" uninstall --yes --quiet --disable-pip-version-check setuptools pip 2>/dev/null ||
    rm -rf "$packages"/pip "$packages"/pip-* "$packages"/setuptools* "$packages"/_distutils_hack

# OpenVINO's devices and formats that no node uses: it runs on CPUs, from graphs of our own and .onnx files.
cd "$packages/openvino"
rm -f libs/*_intel_gpu_plugin* libs/*_intel_npu_plugin* libs/*_auto_plugin* libs/*_auto_batch_plugin* \
    libs/*_hetero_plugin* libs/cache.json libs/*_tensorflow_* libs/*_pytorch_* libs/*_paddle_* libs/*_gguf_* \
    libs/*_jax_* libs/libopenvino_c.so*
rm -rf include cmake

cd "$packages"
find . -type d \( -name tests -o -name test -o -name __pycache__ \) -prune -exec rm -rf {} +
find . -type f \( -name '*.pyx' -o -name '*.pxd' -o -name '*.pyi' -o -name '*.h' -o -name '*.c' -o -name '*.a' \) \
    -not -path './embedmesh/*' -delete
rm -rf numpy/f2py numpy/_core/include numpy/_core/lib "$venv"/include
# Symbols, of packages that have no libraries of others beside them: those were moved about, and strip would break them.
if command -v strip >/dev/null; then
    find uvloop pysqlite3 cryptography tokenizers hf_xet -name '*.so' -exec strip --strip-unneeded {} +
fi
# By hash and unchecked, so that it does not matter which times a layer's files get.
"$python" -m compileall -q -j 0 --invalidation-mode unchecked-hash "$packages"
# What was taken out is not missed.
"$python" -B -c "import aiohttp, cryptography.x509, hf_xet, httptools, huggingface_hub, numpy, openvino, orjson, psycopg
import tokenizers, uvloop, embedmesh.gateway.main, embedmesh.node.member, embedmesh.engine.worker
from embedmesh.storage.sqlite.driver import BRINGS"
