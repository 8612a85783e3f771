"""The log of what depends on the moment."""

from __future__ import annotations

import json
import multiprocessing

import pytest

from megu_cli.errors import ArtifactError, ForeignFileError
from megu_cli.mllm.answers import Answers
from megu_cli.run.json_lines import JSONLines
from megu_cli.run.log import RunLog
from megu_cli.run.ownership import refuse_foreign


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


def test_a_torn_last_line_does_not_swallow_the_next(tmp_path, capsys):
    log = RunLog(tmp_path)
    log.append({"fingerprint": "a", "seconds": 1, "machine": "m"})
    whole = log.file.read_bytes()
    for tail in (whole[:20], whole[:-1], b"something else", b'{"fingerprint": "a", "seco', b"\xff\x00"):
        log.file.write_bytes(whole + tail)
        log.append({"fingerprint": "b", "seconds": 2, "machine": "m"})
        assert log.seconds("a") == (1, "m")
        assert log.seconds("b") == (2, "m")
        assert log.file.read_bytes().startswith(whole)
    assert capsys.readouterr().err.count("damaged") == 1  # of a file it is said once


@pytest.mark.parametrize(
    "line", [b"5", b"[]", b'"fingerprint"', b"\xff\xfe", b"[" * 50_000, b'{"fingerprint": "a"}', b"9" * 5000, b"null"]
)
def test_a_line_of_another_kind_is_skipped_and_said(tmp_path, capsys, line):
    log = RunLog(tmp_path)
    log.append({"fingerprint": "a", "seconds": 1, "machine": "m"})
    log.file.write_bytes(line + b"\n" + log.file.read_bytes())
    assert log.seconds("a") == (1, "m")
    assert "1 of 2 lines is damaged" in capsys.readouterr().err


def test_a_flipped_digit_in_an_answer_is_asked_again(tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    answers = Answers(path)
    answers.append({"q": 1}, {"body": "7"})
    answers.append({"q": 2}, {"body": "8"})
    path.write_text(path.read_text().replace('"body": "7"', '"body": "9"'))
    again = Answers(path)
    assert again.find({"q": 1}) is None
    assert again.find({"q": 2})["body"] == "8"
    assert "1 of 2 lines is damaged or without a checksum: what was answered there is asked again" in (
        capsys.readouterr().err
    )
    again.append({"q": 1}, {"body": "7"})
    assert Answers(path).find({"q": 1})["body"] == "7"


def test_answers_without_a_checksum_are_asked_again(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"key": "k"}) + "\n")
    assert Answers(path)._known == {}


def _append(path, number):
    lines = JSONLines(path, "lost")
    for i in range(40):
        lines.append({"from": number, "i": i, "text": "x" * 5000})


def test_several_processes_append_to_one_file(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"torn')
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=_append, args=(path, number)) for number in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert len(JSONLines(path, "lost").read()) == 120


def test_lines_are_neither_read_from_nor_written_to_a_pipe(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    lines = JSONLines(tmp_path / "pipe", "lost")
    with pytest.raises(ArtifactError):
        lines.read()
    with pytest.raises(ArtifactError):
        lines.append({"a": 1})


def test_a_full_disk_is_told_and_what_was_there_stays(tmp_path):
    import resource

    path = tmp_path / "lines.jsonl"
    lines = JSONLines(path, "lost")
    lines.append({"a": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ArtifactError, match=r"no space left while writing .*; nothing was lost"):
            lines.append({"a": "x" * 3000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert lines.read() == [{"a": 1}]
    lines.append({"a": 2})
    assert lines.read() == [{"a": 1}, {"a": 2}]


def test_what_is_recorded_of_files_is_read_back_and_the_log_tells_that_it_is_megus(tmp_path):
    log, record = RunLog(tmp_path), {"bytes": 1, "head": "a", "parts": []}
    log.append({"time": "now", "stage": "finetune", "fingerprint": "0" * 64, "files": {"model.safetensors": record}})
    assert RunLog(tmp_path).written("model.safetensors") == [record]
    answers = tmp_path / "similarity.answers.jsonl"
    Answers(answers).append({"q": 1}, {"body": "7"})
    for file in (log.file, answers):
        whole = file.read_bytes()
        for size in range(1, len(whole) + 1):  # killed while its first line was written
            file.write_bytes(whole[:size])
            refuse_foreign(tmp_path, file.name)
        file.write_bytes(b'{"loss": 1}\n')
        with pytest.raises(ForeignFileError):
            refuse_foreign(tmp_path, file.name)


def test_no_line_is_appended_through_a_link(tmp_path):
    (tmp_path / "mine.jsonl").write_text("mine\n")
    (tmp_path / "runs.jsonl").symlink_to(tmp_path / "mine.jsonl")
    with pytest.raises(ForeignFileError, match="symbolic link"):
        RunLog(tmp_path).append({"fingerprint": "a"})
    assert (tmp_path / "mine.jsonl").read_text() == "mine\n"
