"""The peers' environment: made once, completed, never guessed at."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench.peers import environment

ALL = {name: "1.0" for name in ("torch", *environment.PACKAGES)}


@pytest.fixture
def installed(monkeypatch):
    """What a pretended interpreter holds, and the installations that were asked for."""
    held, asked = {}, []
    monkeypatch.setattr(environment, "versions", lambda interpreter: dict(held))

    def install(interpreter, requirements):
        asked.append(requirements)
        held.update({name.partition("==")[0]: "1.0" for name in requirements})

    monkeypatch.setattr(environment, "_install", install)
    monkeypatch.setattr(environment.metadata, "version", lambda name: "2.13.0+cpu")
    return held, asked


def folder(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    return tmp_path


def test_torch_first_and_of_our_version(installed, tmp_path):
    assert environment.set_up(folder(tmp_path)).keys() == ALL.keys()
    assert installed[1][0] == ["torch==2.13.0"]
    assert installed[1][1] == [*environment.PACKAGES, "torch==2.13.0"]


def test_what_is_there_stays(installed, tmp_path):
    installed[0].update(ALL)
    environment.set_up(folder(tmp_path))
    assert installed[1] == []
    del installed[0]["trl"]
    environment.set_up(tmp_path)
    assert installed[1] == [["trl", "torch==2.13.0"]]


def test_llama_cpp_is_built_on_request(installed, tmp_path):
    place = folder(tmp_path)
    environment.set_up(place)
    installed[1].clear()
    environment.set_up(place, llama=True)
    environment.set_up(place, llama=True)
    assert installed[1] == [list(environment.EXTRAS)]


def test_an_incomplete_environment_is_none(installed, tmp_path):
    assert environment.python(tmp_path) is None
    place = folder(tmp_path)
    assert environment.python(place) is None
    installed[0].update(ALL)
    assert environment.python(place) == place / "bin" / "python"


def test_versions_of_an_interpreter():
    found = environment.versions(Path(sys.executable))
    assert found["torch"].startswith(environment.torch_requirement().removeprefix("torch=="))


def test_the_environment_is_ignored_by_git():
    assert "/.peers-venv/" in (environment.ROOT / ".gitignore").read_text().splitlines()
