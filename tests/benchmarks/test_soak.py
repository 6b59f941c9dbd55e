"""The soak sees what grows, and its three kinds of work run."""

import json

import pytest

from benchmarks import soak


def hoard(kept):
    def work(count, folder):
        for _ in range(count):
            kept.append([[] for _ in range(100)])
            yield

    return work


def test_what_grows_is_seen(capsys):
    kept = []
    assert not soak.soak("hoard", hoard(kept), 30)
    line = json.loads(capsys.readouterr().out)
    assert not line["ok"]
    assert line["grown"]["objects"] >= 1000
    assert line["grown"]["files"] == 0


def test_a_file_left_open_is_seen(tmp_path, capsys):
    opened = []

    def work(count, folder):
        for number in range(count):
            opened.append((tmp_path / str(number)).open("w"))
            yield

    assert not soak.soak("files", work, 10)
    assert json.loads(capsys.readouterr().out)["grown"]["files"] >= 2
    for file in opened:
        file.close()


@pytest.mark.parametrize("work", [soak.turns, soak.switches, soak.cycles])
def test_each_kind_of_work_runs(work, tmp_path):
    assert len(list(work(2, tmp_path))) == 2


def test_a_cycle_goes_on_where_it_was_stopped(tmp_path, capsys):
    list(soak.cycles(4, tmp_path))
    said = capsys.readouterr().out
    assert said.count("goes on from step 1 of 8") == 2  # LoRA and prefix, the second time each
    assert len(list((tmp_path / "runs").iterdir())) == 2
