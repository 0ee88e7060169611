"""The version that is told of a package is that of the files which Python would import."""

from __future__ import annotations

from pathlib import Path

import pytest

from engram_megatron.jobs.installed import code_digest, imported_version


def _install(place: Path, version: str, *, code: bool = True) -> None:
    """Package made-up, whose code is the module made_up.inner."""
    info = place / f"made_up-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: made-up\nVersion: {version}\n")
    if code:
        _write_code(place)


def _write_code(place: Path, text: str = "") -> None:
    (place / "made_up/inner").mkdir(parents=True)
    (place / "made_up/inner/__init__.py").write_text(text)


def _told(monkeypatch: pytest.MonkeyPatch, *places: Path) -> str:
    with monkeypatch.context() as path:
        for place in reversed(places):
            path.syspath_prepend(place)
        return imported_version("made_up.inner", "made-up")


def test_version_is_that_of_what_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, checkout, edited = (tmp_path / name for name in ("first", "second", "checkout", "edited"))
    assert _told(monkeypatch, first) == "none"
    _install(first, "1.0")
    _install(second, "2.0")
    assert _told(monkeypatch, first, second) == "1.0"
    assert _told(monkeypatch, second, first) == "2.0"
    _install(tmp_path / "words", "9.9", code=False)
    assert _told(monkeypatch, tmp_path / "words", first) == "1.0", "a version without code is not imported"
    _write_code(checkout)
    _write_code(edited, "a = 1\n")
    told = _told(monkeypatch, checkout, first)
    assert told.startswith("code ")
    assert _told(monkeypatch, edited, first) != told


def test_every_edit_of_code_changes_its_digest(tmp_path: Path) -> None:
    for text in ("a = 1\n", "a = 2\n"):
        (tmp_path / "code.py").write_text(text)
        (tmp_path / f"{code_digest([tmp_path])}.seen").write_text("not code")
    (tmp_path / "code.py").rename(tmp_path / "other.py")
    (tmp_path / f"{code_digest([tmp_path])}.seen").write_text("")
    assert len(list(tmp_path.glob("*.seen"))) == 3
