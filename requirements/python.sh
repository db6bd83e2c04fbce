#!/bin/sh
# Print the Python that `make` sets up with: `python3`, or another here that was built with a profile of real programs
# (PGO) where that was not. Such a build is a sixth cheaper for each request. docs/decisions/0028-which-python.md
check='
import ensurepip, sys, venv
from sysconfig import get_config_var
if sys.version_info < (3, 11):
    sys.exit(1)
profiled = "--enable-optimizations" in (get_config_var("CONFIG_ARGS") or "") or get_config_var("PGO_PROF_USE_FLAG") == ""
print("profiled" if profiled else "plain")'
for python in python3 python3.11 python3.12 /usr/bin/python3; do
    if [ "$("$python" -c "$check" 2>/dev/null)" = profiled ]; then
        echo "$python"
        exit
    fi
done
echo python3
