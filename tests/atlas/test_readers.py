"""Readers while another process publishes: no error, and never a row of which one half is older than the other."""

import pytest

from bench.readers import read_while_writing


@pytest.mark.slow
def test_searches_see_whole_rows_while_another_process_publishes_and_compacts(tmp_path):
    seen = read_while_writing(tmp_path, seconds=12)
    assert seen.errors == [] and seen.torn == [] and seen.mixed == []
    assert seen.reads > 10 and seen.writes > 3 and seen.generations > 1
    assert {name.rpartition("_")[0] for name in seen.trained} == {"vector", "example_vector"} and seen.indexed_reads
