"""How exllamav2 0.3.2 reads a directory's RoPE: by its rules, and by its own code where it is
installed.

    python -m tests.exllamav2_config DIR…

prints JSON, one object a directory. exllamav2 builds a CUDA extension when it is imported; its
config.py uses it only to open files, so an empty stand-in does.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.models import ROOT

MISSING = "exllamav2 is not installed (pip install --no-deps exllamav2==0.3.2; no CUDA is needed)"


def is_installed() -> bool:
    return find_spec("exllamav2") is not None


def by_its_rules(folder: Path) -> tuple[float, float]:
    """Base and factor: `rope_theta` at the top, `rope_scaling` with one of `type` and `rope_type`
    ("linear": positions times 1 / factor). It does not look into `rope_parameters`."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    scaling = config.get("rope_scaling") or {}
    assert not (scaling.get("type") and scaling.get("rope_type")), "exllamav2 asserts this"
    kind = scaling.get("type") or scaling.get("rope_type")
    return config["rope_theta"], scaling["factor"] if kind == "linear" else 1.0


def by_itself(*folders: Path) -> list[dict[str, Any]]:
    """What its ExLlamaV2Config says of each directory, in a process of its own."""
    command = [sys.executable, "-m", "tests.exllamav2_config", *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


class _Extension:
    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: 0


def _main(folders: list[str]) -> None:
    spec = find_spec("exllamav2")
    assert spec is not None, MISSING
    package: Any = types.ModuleType("exllamav2")
    package.__path__ = list(spec.submodule_search_locations or ())
    extension: Any = types.ModuleType("exllamav2.ext")
    extension.exllamav2_ext, extension.none_tensor = _Extension(), None
    sys.modules.update({"exllamav2": package, "exllamav2.ext": extension})
    config = importlib.import_module("exllamav2.config")
    found = []
    for folder in folders:
        read = config.ExLlamaV2Config(folder)
        found.append(
            {
                "theta": read.rotary_embedding_base,
                "factor": read.scale_pos_emb,
                "eos": read.eos_token_id,
                "generation_eos": read.generation_config["eos_token_id"],
                "max_seq_len": read.max_seq_len,
                "gptq_v2": read.checkpoint_offset_qzeros,
                "tensors": len(read.tensor_file_map),
            }
        )
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    _main(sys.argv[1:])
