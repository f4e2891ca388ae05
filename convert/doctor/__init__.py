"""Finds what old or careless conversions got wrong in a GGUF, and the keys that mend it."""

from dsq.convert.doctor.diagnose import diagnose
from dsq.convert.doctor.findings import Diagnosis, Finding, mended_entries

__all__ = ["Diagnosis", "Finding", "diagnose", "mended_entries"]
