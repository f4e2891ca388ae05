"""The rooms import left to right only, and the command line starts without the heavy ones."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.models import ROOT

# A room may import itself and what stands in its set. dsq.errors is everyone's.
MAY_IMPORT = {
    "quant": set(),
    "tokenizer_port": set(),
    "convert": {"quant", "tokenizer_port"},
    "runtime": {"quant", "tokenizer_port", "convert"},
    "cli": {"quant", "tokenizer_port", "convert", "runtime"},
}
HEAVY = {"torch", "transformers", "llama_cpp", "numpy", "huggingface_hub", "tokenizers", "rich"}


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "dsq":
                names = [f"dsq.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "dsq" and len(parts) > 1 and parts[1] in MAY_IMPORT:
                yield parts[1]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_left_to_right(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        wrong = set(imported_rooms(path)) - MAY_IMPORT[room] - {room}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def modules_after(code):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split())  # what a help says comes before


def test_help_imports_nothing_heavy():
    loaded = modules_after("from dsq.cli.main import main\nmain(['--help'])")
    assert not loaded & HEAVY


@pytest.mark.parametrize(
    "verb",
    [
        *("convert", "quantize", "inspect", "eval", "complete", "chat"),
        *("serve", "fit", "devices", "package"),
    ],
)
def test_a_verbs_help_imports_no_engine(verb):
    code = (
        f"from dsq.cli.main import main\ntry: main([{verb!r}, '--help'])\nexcept SystemExit: pass"
    )
    assert not modules_after(code) & {"torch", "transformers", "llama_cpp"}


def test_converting_needs_no_torch_and_no_llama_cpp():
    loaded = modules_after(
        "import dsq.convert.pipeline, dsq.convert.checkpoint, dsq.convert.inspect"
    )
    assert not loaded & {"torch", "transformers", "llama_cpp", "huggingface_hub"}


def test_no_generic_name_reaches_site_packages():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'include = ["dsq*"]' in text
    for room in MAY_IMPORT:
        assert (ROOT / "dsq" / room).is_symlink()


def test_no_code_of_a_checkpoint_is_ever_run():
    for room in MAY_IMPORT:
        for path in (ROOT / room).rglob("*.py"):
            tree = ast.parse(path.read_text())
            names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
            names |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
            words = {k.arg for n in ast.walk(tree) if isinstance(n, ast.Call) for k in n.keywords}
            assert not names & {"AutoTokenizer", "AutoModel", "AutoModelForCausalLM"}, path
            assert "trust_remote_code" not in words, path
            for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
                if ast.unparse(call.func) in ("torch.load", "pickle.load", "pickle.loads"):
                    keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
                    assert keywords.get("weights_only") == "True", path
