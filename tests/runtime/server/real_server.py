"""`dsq serve` as a process, and a small model that chats and fills in: tiny-coder's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.models import ROOT, TINY_CODER

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}\n"
    "{% elif m['role'] == 'user' %}### Instruction:\n{{ m['content'] }}\n"
    "{% else %}### Response:\n{{ m['content'] }}\n<|EOT|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)


def chat_coder(folder: Path) -> Path:
    """tiny-coder as a GGUF, with a chat template like DeepSeek Coder's. In f32, so that batches of
    different shapes round to the same greedy tokens."""
    from dsq.convert.checkpoint import open_checkpoint
    from dsq.convert.pipeline import plan_gguf, run_gguf_plan
    from dsq.quant.presets import PRESETS

    source = folder / "tiny-coder"
    shutil.copytree(TINY_CODER, source)
    settings = source / "tokenizer_config.json"
    settings.write_text(
        json.dumps({**json.loads(settings.read_text()), "chat_template": CHAT_TEMPLATE})
    )
    checkpoint = open_checkpoint(source)
    made = folder / "tiny-coder.gguf"
    run_gguf_plan(checkpoint, plan_gguf(checkpoint, PRESETS["f32"]), made)
    return made


def start(*args: str, log: Path | None = None) -> tuple[subprocess.Popen[str], str]:
    """The process, and its URL once it listens. Its log goes to a file, or nowhere."""
    with (log or Path(os.devnull)).open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "dsq.cli.main", "serve", *args, "--port", "0", "-t", "1"],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    if " on http://" not in line:
        process.kill()
        process.communicate()
        raise RuntimeError(f"dsq serve {' '.join(args)} did not start: {line!r}")
    return process, line.split()[-1]


def stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
    process.communicate()


@contextmanager
def served(*args: str, log: Path | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process, url = start(*args, log=log)
    try:
        yield process, url
    finally:
        stop(process)
