"""What dsq writes for Hugging Face, loaded by the installed transformers.

`make test-transformers` does the same with other versions.
"""

from __future__ import annotations

import pytest

from tests.convert.hf_loading import write_controls, write_directories
from tests.convert.hf_probe import probe

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return write_directories(tmp_path_factory.mktemp("hf"))


def test_every_directory_loads_as_dsq_reads_it(directories):
    wrong = {
        (directory.name, check): said
        for directory in directories
        for check, said in probe(directory).items()
        if said
    }
    assert wrong == {}


def test_the_checks_find_a_missing_bos(directories, tmp_path):
    found = probe(write_controls(tmp_path, directories[0])["no BOS step"])
    assert found["bos"]
    assert not found["ids"]
