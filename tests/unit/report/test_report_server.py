"""A run is watched on this computer alone, and its page is made when it has written."""

from __future__ import annotations

import threading
from http.client import HTTPConnection

import pytest

from pet_finetune.report import report_file
from pet_finetune.report.report_file import ReportServer

TABLE = "epoch,learning_rate,loss\n1,1e-3,0.5\n"


@pytest.fixture
def serve(tmp_path):
    """Serve the folder of a run that has made an epoch; how to ask for a page, and the folder."""
    (tmp_path / "train.csv").write_text(TABLE)
    with ReportServer(tmp_path, every=3) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()

        def get(path="/", **headers):
            connection = HTTPConnection(*server.server_address[:2], timeout=60)
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

        yield get, tmp_path
        server.shutdown()
        thread.join()


def test_the_page_asks_again_until_the_run_has_results(serve):
    get, folder = serve
    status, page = get()
    assert status == 200
    assert "stopped after epoch 1" in page
    assert '<meta http-equiv="refresh" content="3">' in page
    (folder / "results.json").write_text("{}")
    assert "refresh" not in get()[1]


def test_a_run_of_another_process_is_under_way(serve, monkeypatch):
    get, _ = serve
    monkeypatch.setattr(report_file, "is_running", lambda folder: True)
    monkeypatch.setattr("pet_finetune.report.run_record.is_running", lambda folder: True)
    assert "Under way, after epoch 1" in get()[1]


def test_a_page_is_made_once_for_each_epoch(serve, monkeypatch):
    get, folder = serve
    made = []
    monkeypatch.setattr(report_file, "page_of", lambda folder: made.append(1) or "<p>page</p>")
    get(), get()
    assert len(made) == 1
    (folder / "train.csv").write_text(TABLE + "2,1e-3,0.4\n")
    get(), get()
    assert len(made) == 2


def test_a_run_that_has_written_nothing_yet_is_waited_for(serve):
    get, folder = serve
    (folder / "train.csv").unlink()
    status, page = get()
    assert status == 200
    assert "holds no run" in page
    assert "refresh" in page


def test_only_this_computer_is_answered(serve):
    get, _ = serve
    assert get(Host="evil.example:80")[0] == 403
    assert get("/etc/passwd")[0] == 404
