"""The page of a run under way, in a browser: it comes anew by itself, until the run is done."""

from __future__ import annotations

import threading

from pet_finetune.report.report_file import ReportServer

TABLE = "epoch,learning_rate,loss\n1,1e-3,0.5\n"


def test_the_page_follows_the_run(browser, tmp_path):
    (tmp_path / "train.csv").write_text(TABLE)
    page = browser.new_page()
    with ReportServer(tmp_path, every=1) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page.goto(server.address)
        assert "after epoch 1" in page.inner_text(".verdict")
        (tmp_path / "train.csv").write_text(TABLE + "2,1e-3,0.4\n")
        page.locator(".verdict", has_text="epoch 2").wait_for()
        (tmp_path / "results.json").write_text("{}")
        page.locator("meta[http-equiv=refresh]").wait_for(state="detached")
        server.shutdown()
    page.close()
