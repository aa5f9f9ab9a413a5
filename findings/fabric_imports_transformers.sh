#!/usr/bin/env bash
# Lightning Fabric 2.6.6 + torchmetrics 1.9.0 + transformers 5.24.0 + torch 2.14.1: `import lightning_fabric` imports
# transformers, torchvision and SciPy where they are installed.
#
# `lightning_fabric/utilities/imports.py` compares the version of torchmetrics with 1.0.0 at import, for one rarely used
# callback (`SpikeDetection`). `lightning_utilities.core.imports.compare_version` imports the whole package for that,
# although the version could be read from the installed metadata. `import torchmetrics` in turn imports all of its
# functional interface, and `torchmetrics.functional.text.bert` imports transformers at module level. So every program
# that uses Fabric, of whatever kind, waits for all of them: seconds of processor time before its first own line.
#
# Exits 0 while that is so, 1 when it has changed.
#
# Output seen:
#   import lightning_fabric        imports: torchmetrics transformers torchvision scipy
#   torchmetrics' version read from metadata instead, imports: none of them
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.14.1 torchvision==0.29.1 lightning-fabric==2.6.6 lightning-utilities==0.15.3 \
    torchmetrics==1.9.0 transformers==5.24.0 scipy==1.17.1
cat > seen.py <<'PYTHON'
import sys
import time

import torch

if sys.argv[1:] == ["metadata"]:
    import importlib.metadata

    from lightning_utilities.core import imports
    from packaging.version import Version

    compare = imports.compare_version

    def compare_version(package, op, version, use_base_version=False):
        if package != "torchmetrics":
            return compare(package, op, version, use_base_version)
        return op(Version(importlib.metadata.version(package)), Version(version))

    imports.compare_version = compare_version
began = time.process_time()
import lightning_fabric  # noqa: E402

took = time.process_time() - began
packages = ["torchmetrics", "transformers", "torchvision", "scipy"]
print(*[name for name in packages if name in sys.modules] or ["none of them"])
print(f"{took:.1f} processor seconds", file=sys.stderr)
PYTHON
found=$(venv/bin/python seen.py)
instead=$(venv/bin/python seen.py metadata)
echo "import lightning_fabric        imports: $found"
echo "torchmetrics' version read from metadata instead, imports: $instead"
[ "$found" = "torchmetrics transformers torchvision scipy" ] && [ "$instead" = "none of them" ]
