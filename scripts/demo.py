"""`make demo`: the main job on a real model, through the commands that a user would type."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2 = ROOT / ".cache" / "peers" / "SmolLM2-135M-Instruct.Q4_1.gguf"
TINY_CODER = ROOT / "models" / "tiny-coder"
TEXT = TINY_CODER / "heldout.txt"
OUT = ROOT / "demo"
TYPES = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0")
CHUNKS = "8"
HOLE = (
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n"
    "    def push(self, item):\n        self.items.",
    "\n\n    def pop(self):\n        return self.items.pop()\n",
)


def title(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def run(*args: str | Path, show: bool = True) -> str:
    """Run `dsq …` as a user would; returns what it printed."""
    words = [str(a) for a in args]
    if show:
        shown = [w.replace(f"{ROOT}/", "") for w in words]
        print(f"$ dsq {shlex.join(shown)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "dsq.cli.main", *words], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def show(*args: str | Path) -> None:
    print(run(*args).rstrip().replace(f"{ROOT}/", "") + "\n", flush=True)


def main() -> None:
    start = time.perf_counter()
    OUT.mkdir(exist_ok=True)
    hf, bf16 = OUT / "smollm2", OUT / "smollm2-bf16.gguf"

    title("1. Import: a 4-bit GGUF becomes a Hugging Face checkpoint again")
    print(
        "SmolLM2-135M-Instruct comes as Q4_1. Its weights lie on that grid, where another 4-bit\n"
        "type would look too good; so seeded noise of 0.3 of each block's step is added."
    )
    show("convert", SMOLLM2, "--to", "hf", "--dither", "0.3", "-o", hf, "--force")

    title("2. Convert: the checkpoint becomes a 16-bit GGUF, the reference")
    show("convert", hf, "--to", "gguf", "--outtype", "bf16", "-o", bf16, "--force")
    show("inspect", bf16)

    title("3. Quantize: five types, each in one pass from the checkpoint")
    files = {}
    for name in TYPES:
        files[name] = OUT / f"smollm2-{name}.gguf"
        show("quantize", name, hf, "-o", files[name], "--force")

    title("4. Measure: what each type costs, on held-out Python source")
    rows = []
    for name, path in files.items():
        args = ("eval", path, "--ref", bf16, "--text", TEXT, "--chunks", CHUNKS, "--json")
        rows.append((name, json.loads(run(*args))))
    ref_ppl = rows[0][1]["ref_ppl"]
    print(f"\n{'type':<8} {'MiB':>6} {'bpw':>6} {'PPL':>9} {'mean KLD':>9} {'same top':>9}")
    print(f"{'bf16':<8} {bf16.stat().st_size / 2**20:6.1f} {16:6.2f} {ref_ppl:9.4f}")
    for name, r in rows:
        print(
            f"{name:<8} {r['size_bytes'] / 2**20:6.1f} {r['bpw']:6.2f} {r['ppl']:9.4f} "
            f"{r['kld_mean']:9.5f} {100 * r['top1_agreement']:8.2f}%"
        )
    print("(576-wide rows are no multiple of 256, so most K-quant tensors fall back here.)")

    title("5. Verify: the artifact is its source")
    show("verify", files["q8_0"], "--source", hf)

    title("6. Answer: a completion, a hole filled, a chat")
    show("complete", files["q8_0"], "-p", "def fibonacci(n):\n", "-n", "60")
    tiny = OUT / "tiny-coder-q8_0.gguf"
    print("(SmolLM2 knows no fill-in-the-middle; tiny-coder, 5 M weights, does.)")
    show("quantize", "q8_0", TINY_CODER, "-o", tiny, "--force")
    prefix, suffix = HOLE
    hole = run("complete", tiny, "-p", prefix, "--suffix", suffix, "-n", "12", "--json", show=False)
    print(f"$ dsq complete {tiny.relative_to(ROOT)} -p … --suffix …")
    start_hole, end_hole = ("\033[7m", "\033[0m") if sys.stdout.isatty() else ("[", "]")
    print(f"{prefix}{start_hole}{json.loads(hole)['text']}{end_hole}{suffix}")
    show("chat", files["q8_0"], "-p", "What is a unit test?", "-n", "60", "--temp", "0")

    title(f"Done in {time.perf_counter() - start:.0f} seconds. The files:")
    for path in sorted(OUT.iterdir()):
        size = sum(f.stat().st_size for f in ([path] if path.is_file() else path.iterdir()))
        print(f"  {path.relative_to(ROOT)!s:<40} {size / 2**20:8.1f} MiB")
    print("Activate the environment to use dsq on your own model: source .venv/bin/activate")


if __name__ == "__main__":
    main()
