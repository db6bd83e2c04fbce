#!/bin/sh
# Take out of a virtual environment (argument 1) what embedmesh never loads, strip what is left, and compile it: the
# image is read-only, so that nothing could be compiled later. What was taken out is not missed: all of ours is imported.
# Packages of others are kept compiled only; a traceback still names their files and lines.
set -eu
venv=$1
packages=$(echo "$venv"/lib/python3*/site-packages)
python="$venv/bin/python"

# What only building needed, and pip.
"$venv/bin/pip" uninstall --yes --quiet --disable-pip-version-check \
    hatchling editables trove-classifiers pluggy pathspec tomlkit
"$venv/bin/pip" uninstall --yes --quiet --disable-pip-version-check setuptools pip 2>/dev/null ||
    rm -rf "$packages"/pip "$packages"/pip-* "$packages"/setuptools* "$packages"/_distutils_hack "$packages"/pkg_resources
rm -f "$packages"/distutils-precedence.pth "$venv"/bin/pip* "$venv"/bin/Activate.ps1

# OpenVINO's devices and formats that no node uses: it runs on CPUs, from graphs of our own and .onnx files.
cd "$packages/openvino"
rm -f libs/*_intel_gpu_plugin* libs/*_intel_npu_plugin* libs/*_auto_plugin* libs/*_auto_batch_plugin* \
    libs/*_hetero_plugin* libs/cache.json libs/*_tensorflow_* libs/*_pytorch_* libs/*_paddle_* libs/*_gguf_* \
    libs/*_jax_* libs/libopenvino_c.so* libs/libtbbmalloc_proxy*
rm -rf include cmake torch tools frontend/pytorch frontend/tensorflow frontend/jax frontend/paddle

cd "$packages"
find . -type d \( -name tests -o -name test -o -name __pycache__ \) -prune -exec rm -rf {} +
find . -type f \( -name '*.pyx' -o -name '*.pxd' -o -name '*.pyi' -o -name '*.h' -o -name '*.c' -o -name '*.a' \) \
    -not -path './embedmesh/*' -delete
# numpy's dice and the like, colours for source code and Markdown, a parser of C: nobody here asks for them.
rm -rf numpy/f2py numpy/_core/include numpy/_core/lib numpy/_core/*_tests.* numpy/_core/_simd.* numpy/random \
    numpy/polynomial numpy/distutils numpy/doc "$venv"/include
rm -rf pygments pygments-* markdown_it markdown_it_py-* mdurl mdurl-* pycparser pycparser-* cffi cffi-* huggingface_hub/cli
# A faster way to fetch models; without it the hub's own client takes plain HTTPS.
rm -rf hf_xet hf_xet-*
rm -f ./*.dist-info/RECORD
# Symbols, of packages that have no libraries of others beside them: those were moved about, and strip would break them.
if command -v strip >/dev/null; then
    find . -name '*.so' -not -path './openvino/*' -not -path './numpy*' -not -path './psycopg_binary*' \
        -exec strip --strip-unneeded {} +
fi
# By hash and unchecked, so that it does not matter which times a layer's files get.
"$python" -m compileall -q -j 0 --invalidation-mode unchecked-hash "$packages/embedmesh"
"$python" -m compileall -q -j 0 -b -x 'site-packages/embedmesh/' --invalidation-mode unchecked-hash "$packages"
find . -name '*.py' -not -path './embedmesh/*' -delete
"$python" -B -c "
import importlib, pkgutil, openvino, openvino.frontend, psycopg, cryptography.x509, embedmesh
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
SKIPPED = {'embedmesh.__main__', 'embedmesh.daft', 'embedmesh.ray', 'embedmesh.engine.native.encoder'}
EXTRAS = {'daft', 'joserfc', 'lance', 'opentelemetry', 'pyarrow', 'qdrant_client', 'ray'}
for each in pkgutil.walk_packages(embedmesh.__path__, 'embedmesh.'):
    if each.name not in SKIPPED:
        try:
            importlib.import_module(each.name)
        except ModuleNotFoundError as error:
            if error.name.partition('.')[0] not in EXTRAS:
                raise
"
