"""The log of what depends on the moment."""

from __future__ import annotations

from megu_cli.run_log import RunLog


def test_the_last_whole_entry_counts(tmp_path):
    log = RunLog(tmp_path / "run")
    assert log.last("a") is None
    for seconds in (1.5, 2.5):
        log.append({"fingerprint": "a", "seconds": seconds, "machine": "m"})
    log.append({"fingerprint": "b", "seconds": 9, "machine": "m"})
    with log.file.open("a") as stream:
        stream.write('{"fingerprint": "a", "seco')  # killed while it wrote
    assert log.seconds("a") == (2.5, "m")
    assert log.seconds("c") is None
