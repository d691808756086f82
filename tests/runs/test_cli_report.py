"""`tessera report`: one self-contained page of a run, and errors in one message."""

import re
import shutil


def test_the_page_is_written_to_the_run_and_is_self_contained(tessera, trained, tmp_path, read_page):
    run = shutil.copytree(trained, tmp_path / "run")
    done = tessera("report", run)
    assert done.code == 0, done.err
    assert done.out == f"{run / 'report.html'}\n"
    html = (run / "report.html").read_text()
    page = read_page(html)
    assert all(link.startswith("data:image/") for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"https?:|@import|url\(", html)
    assert "4 of 4" in page.sections[""]
    assert "All steps are done" in page.sections[""]
    assert page.images("samples, step 4")
    assert page.images("Loss: ")
    assert "1,000 images" in page.sections["Environment"]


def test_out_writes_elsewhere_over_an_older_page_and_leaves_the_run_unchanged(tessera, trained, tmp_path):
    before = sorted(trained.rglob("*"))
    (tmp_path / "page.html").write_text("older")
    done = tessera("report", trained, "--out", tmp_path / "page.html")
    assert (done.code, done.out) == (0, f"{tmp_path / 'page.html'}\n")
    assert "4 of 4" in (tmp_path / "page.html").read_text()
    assert sorted(trained.rglob("*")) == before


def test_errors_are_one_message(tessera, trained, tmp_path):
    done = tessera("report", tmp_path)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"error: {tmp_path} holds no run")
    (tmp_path / "file").write_text("")
    done = tessera("report", trained, "--out", tmp_path / "file" / "page.html")
    assert done.code == 1
    assert done.err.startswith("error: cannot write")
