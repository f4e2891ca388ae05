"""`make test-transformers`: what dsq writes for Hugging Face, loaded by several transformers.

Each version gets a throw-away environment in .cache/transformers-envs (about 280 MB, without
torch), kept for the next time; delete the folder at will. Exit 1 if any check fails, or if the
checks do not find what is wrong with the controls.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.convert import hf_loading, hf_probe

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / ".cache" / "transformers-envs"
# The newest of 4.57, 5.5, 5.20 and 5.23; pip takes the tokenizers that each wants.
VERSIONS = ("4.57.6", "5.5.4", "5.20.2", "5.23.0")
# Control → check → the versions that must fail it. For LlamaTokenizerFast, 4.57 takes
# tokenizer.json as it is and 5.23 sees that it is byte-level; those between put SentencePiece's
# treatment of spaces into it.
CONTROLS = {
    "LlamaTokenizerFast": {
        "ids": ("5.5.4", "5.20.2"),
        "spaces": ("5.5.4", "5.20.2"),
    },
    "no BOS step": {"bos": VERSIONS},
}

Result = dict[str, dict[str, str | None]]  # directory → check → what is wrong


def environment(version: str) -> Path:
    """The Python of the version's environment, made if it is not there."""
    folder = ENVIRONMENTS / version
    python, done = folder / "bin" / "python", folder / ".done"
    if done.exists():
        return python
    print(f"Making an environment with transformers {version}.", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _quietly(sys.executable, "-m", "venv", folder)
    _quietly(
        *(python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"),
        *(f"transformers=={version}", "jinja2"),  # jinja2: for chat templates
    )
    done.touch()
    return python


def _quietly(*command: str | Path) -> None:
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{done.stdout}\n{' '.join(map(str, command))}: exit {done.returncode}")


def load(version: str, directories: list[Path]) -> Result:
    done = subprocess.run(
        [environment(version), "-I", hf_probe.__file__, *directories],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        text=True,
        capture_output=True,
    )
    if done.returncode:
        sys.exit(f"{done.stderr}\ntransformers {version}: the probe failed")
    said = json.loads(done.stdout)
    assert said["transformers"] == version, f"{version} is asked for, {said['transformers']} came"
    found: Result = said["directories"]
    return found


def row(first: str, second: str, cells: list[str]) -> str:
    return f"{first:<13} {second:<20}" + "".join(f"{cell:<9}" for cell in cells)


def print_result(version: str, result: Result) -> int:
    """One line a directory; the number of checks that failed."""
    for name, found in result.items():
        cells = ["FAIL" if found[check] else "pass" for check in hf_probe.CHECKS]
        print(row(version, name, cells).rstrip())
    for name, found in result.items():
        for check, wrong in found.items():
            if wrong:
                print(f"    {name}, {check}: {wrong}")
    return sum(wrong is not None for found in result.values() for wrong in found.values())


def blind_spots(version: str, controls: dict[str, Path]) -> int:
    """Show what the controls do in this version; the number of faults that were not found."""
    result = load(version, list(controls.values()))
    missed = 0
    for name, directory in controls.items():
        found = result[directory.name]
        failed = [check for check, wrong in found.items() if wrong]
        must = [check for check, versions in CONTROLS[name].items() if version in versions]
        unseen = [check for check in must if check not in failed]
        verdict = f"NOT FOUND: {', '.join(unseen)}" if unseen else "as it must be"
        print(f"{version:<13} {name:<20}fails {', '.join(failed) or 'nothing'} ({verdict})")
        missed += len(unseen)
    return missed


def main() -> int:
    for version in VERSIONS:
        environment(version)
    with tempfile.TemporaryDirectory() as name:
        directories = hf_loading.write_directories(Path(name))
        controls = hf_loading.write_controls(Path(name), directories[0])
        print(row("transformers", "directory", list(hf_probe.CHECKS)).rstrip())
        failed = sum(print_result(v, load(v, directories)) for v in VERSIONS)
        print("\nControls, each with a fault that the checks must find:")
        missed = sum(blind_spots(v, controls) for v in VERSIONS)
    print(f"\n{failed} checks failed, {missed} faults of the controls not found.")
    return 1 if failed or missed else 0


if __name__ == "__main__":
    sys.exit(main())
