"""What the benchmarks measure with; nothing here asserts a time."""

from __future__ import annotations

import sys

import pytest

from benchmarks import results
from benchmarks.evaluation import _clock
from benchmarks.inside import ThreadTimes
from benchmarks.measure import run
from benchmarks.models import _Noise

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks read /proc")


def python(code, **more):
    return run([sys.executable, "-c", code], **more)


def test_bytes_written_are_counted_with_the_childrens(tmp_path):
    child = f"open({str(tmp_path / 'a')!r}, 'wb').write(bytes(300_000))"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}]); print('x')"
    used = python(code)
    assert used.output == "x\n"
    assert 300_002 <= used.written < 310_000
    assert used.anonymous is None


def test_memory_is_the_heap_not_the_parents():
    used = python("import time; a = bytearray(200 << 20); time.sleep(0.3)", sample=True)
    assert 200 << 20 <= used.anonymous < 300 << 20
    assert used.mapped < 100 << 20


def test_a_failing_command_shows_its_output():
    with pytest.raises(RuntimeError, match=r"failed \(3\)(.|\n)*no such luck"):
        python("import sys; print('no such luck'); sys.exit(3)")


def test_a_section_replaces_only_itself(tmp_path):
    path = tmp_path / "RESULTS.md"
    for name, body in (("a", "first"), ("b", "other"), ("a", "second")):
        results.write(results.Section(name, name.upper(), body), path)
    text = path.read_text()
    assert "first" not in text
    assert text.index("## A\n\nsecond") < text.index("## B\n\nother")
    assert text.startswith("# Results")


def test_verdicts():
    assert results.Goal(0.4).verdict(0.4) == "≤ 0.4 ×: met"
    assert results.Goal(85, at_least=True, unit="%").verdict(84.9) == "≥ 85 %: **missed**"
    assert results.spread([3.0, 1.0, 2.0]) == "2.00 (1.00 … 3.00)"


def test_llama_cpp_log_timestamps():
    assert _clock("2.05.452.102") == pytest.approx(125.452102)


def test_thread_times_of_a_wrapped_function():
    class Owner:
        @staticmethod
        def work():
            return sum(range(10_000))

    times = ThreadTimes()
    times.wrap(Owner, "work", "key")
    assert Owner.work() == sum(range(10_000))
    assert times.seconds["key"] > 0


def test_no_two_tensors_of_noise_are_equal(tmp_path):
    noise = _Noise(seed=0)
    data = []
    for name in ("a.weight", "b.weight", "c.norm.weight"):
        with open(tmp_path / name, "wb") as file:
            noise.write(file, name, 1000)
        data.append((tmp_path / name).read_bytes())
    assert [len(d) for d in data] == [2000] * 3
    assert len(set(data)) == 3
