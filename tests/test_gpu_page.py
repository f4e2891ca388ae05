"""What `make test-gpu` writes down."""

from __future__ import annotations

from datetime import date

from scripts.record_gpu import MARK, outcomes, page

REPORT = """<testsuites><testsuite>
<testcase classname="tests.runtime.test_exl2_export" name="test_a" time="1.25" />
<testcase classname="tests.runtime.test_exl2_export" name="test_b" time="0.5"><failure/></testcase>
<testcase classname="tests.quant.test_c" name="test_c" time="0"><skipped/></testcase>
</testsuite></testsuites>"""


def test_every_outcome_is_written_under_the_card_and_the_day():
    rows = outcomes(REPORT)
    assert [row[1] for row in rows] == ["passed", "failure", "skipped"]
    text = page("# Head", "Some Card", date(2026, 1, 2), rows)
    assert text.startswith(f"# Head\n\n{MARK}\n")
    assert "2026-01-02, Some Card." in text
    assert "| runtime.test_exl2_export::test_b | failure | 0.5 |" in text
