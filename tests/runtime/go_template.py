"""What Go's own text/template makes of a template: live where Go is installed, else as recorded.

`python -m tests.runtime.go_template` records again; the test says when that is needed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORDED = HERE / "go_rendered.json"


def go() -> str | None:
    return shutil.which("go")


def render(jobs: Sequence[dict[str, Any]]) -> list[str]:
    """The text of each {template, values}. Needs Go (Debian: golang-go)."""
    done = subprocess.run(
        [go() or "go", "run", str(HERE / "go_template.go")],
        input=json.dumps(list(jobs)),
        capture_output=True,
        text=True,
        check=True,
    )
    texts: list[str] = json.loads(done.stdout)
    return texts


def recorded(jobs: Sequence[dict[str, Any]]) -> list[str] | None:
    """The texts as Go made them when they were recorded; None when these jobs were not."""
    found = {json.dumps(r["job"], sort_keys=True): r["text"] for r in _records()}
    texts = [found.get(json.dumps(job, sort_keys=True)) for job in jobs]
    return None if None in texts else [text for text in texts if text is not None]


def _records() -> list[dict[str, Any]]:
    if not RECORDED.is_file():
        return []
    records: list[dict[str, Any]] = json.loads(RECORDED.read_text(encoding="utf-8"))
    return records


if __name__ == "__main__":
    from tests.runtime.test_package import all_jobs

    made = all_jobs()
    records = [{"job": j, "text": t} for j, t in zip(made, render(made), strict=True)]
    RECORDED.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{RECORDED}: {len(records)} texts")
