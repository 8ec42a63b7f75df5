from __future__ import annotations

from flexvar import progress as module
from flexvar.progress import progress, within


def test_plain_lines_where_there_is_no_terminal(capsys, monkeypatch) -> None:
    assert list(progress([1, 2, 3], "drawing")) == [1, 2, 3]
    assert capsys.readouterr().err == "drawing: 3 of 3\n"
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    assert list(progress("ab", "drawing")) == ["a", "b"]
    assert capsys.readouterr().err == "drawing: 1 of 2\ndrawing: 2 of 2\n"
    assert list(progress(["ab", "c"], "drawing", count=len)) == ["ab", "c"]
    assert capsys.readouterr().err == "drawing: 2 of 3\ndrawing: 3 of 3\n"


def test_a_bar_on_a_terminal(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert list(progress(range(4), "drawing")) == [0, 1, 2, 3]
    assert "100%" in capsys.readouterr().err


def test_the_parts_of_an_item_have_a_bar_on_a_terminal_alone(capsys, monkeypatch) -> None:
    assert list(within(iter("abc"), 3, "scales")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert list(within(iter("abc"), 3, "scales")) == ["a", "b", "c"]
    assert "scales" in capsys.readouterr().err
