from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import importlib, pkgutil, sys
import splitserve.config, splitserve.obs, splitserve.rpc
for package in (splitserve.obs, splitserve.rpc):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""


def test_what_every_service_imports_is_free_of_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"
