"""`tessera report`: a page of a run, wherever it is wanted, and errors in one message."""

import shutil


def test_the_page_stands_in_the_run_and_its_place_is_told(tessera, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    done = tessera("report", run)
    assert done.code == 0, done.err
    assert done.out == f"{run / 'report.html'}\n"
    assert "4 of 4" in (run / "report.html").read_text()


def test_out_writes_it_elsewhere_over_an_older_one_and_leaves_the_run_alone(tessera, trained, tmp_path):
    before = sorted(trained.rglob("*"))
    (tmp_path / "page.html").write_text("older")
    done = tessera("report", trained, "--out", tmp_path / "page.html")
    assert (done.code, done.out) == (0, f"{tmp_path / 'page.html'}\n")
    assert "4 of 4" in (tmp_path / "page.html").read_text()
    assert sorted(trained.rglob("*")) == before


def test_a_folder_that_holds_no_run_is_one_message(tessera, tmp_path):
    done = tessera("report", tmp_path)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"error: {tmp_path} holds no run")


def test_a_page_that_cannot_be_written_is_one_message(tessera, trained, tmp_path):
    (tmp_path / "file").write_text("")
    done = tessera("report", trained, "--out", tmp_path / "file" / "page.html")
    assert done.code == 1
    assert done.err.startswith("error: cannot write")
