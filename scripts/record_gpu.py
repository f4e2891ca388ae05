"""`make test-gpu`: run the tests marked `gpu`, and write in docs/gpu.md what ran on which card.

Without a card nothing is run and nothing is written.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "gpu.md"
MARK = "<!-- written by make test-gpu -->"


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print("test-gpu: PyTorch sees no CUDA card; nothing was run, docs/gpu.md stays as it is")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={report}"]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if not report.exists():
            return code
        rows = outcomes(report.read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8").split(MARK)[0].rstrip()
    card = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, torch {torch.__version__}"
    PAGE.write_text(page(text, card, date.today(), rows), encoding="utf-8")
    return code


def outcomes(report: str) -> list[tuple[str, str, float]]:
    """(test, what became of it, seconds) from pytest's junit file."""
    found = []
    for case in ElementTree.fromstring(report).iter("testcase"):
        bad = {child.tag for child in case} & {"failure", "error", "skipped"}
        name = f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name')}"
        found.append((name, bad.pop() if bad else "passed", float(case.get("time", 0))))
    return found


def page(head: str, card: str, day: date, rows: list[tuple[str, str, float]]) -> str:
    lines = [f"| {name} | {result} | {seconds:.1f} |" for name, result, seconds in rows]
    table = "\n".join(["| test | result | seconds |", "| --- | --- | ---: |", *lines])
    return f"{head}\n\n{MARK}\n## Last run\n\n{day.isoformat()}, {card}.\n\n{table}\n"


if __name__ == "__main__":
    sys.exit(main())
