"""What the project promises about itself: licence, packages, the build, the two commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastllm

ROOT = Path(__file__).parent.parent
# Hosts that pip downloads from have no place in the tree: users configure their own.
HOSTS = ("py" + "pi.org", "python" + "hosted.org", "download.py" + "torch.org")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def test_the_versions_agree(project: dict[str, Any]) -> None:
    assert project["project"]["version"] == fastllm.__version__


def test_the_licence_is_apache(project: dict[str, Any]) -> None:
    assert project["project"]["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text


def test_nothing_is_pinned(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    for requirements in (project["project"]["dependencies"], *extras.values()):
        for requirement in requirements:
            assert "==" not in requirement.split(";")[0], requirement


def test_the_build_does_not_ask_for_torch(project: dict[str, Any]) -> None:
    requires = " ".join(project["build-system"]["requires"])
    assert "torch" not in requires
    assert {"setuptools", "ninja", "pybind11"} <= set(re.findall(r"[a-z0-9]+", requires))


def test_every_package_is_listed(project: dict[str, Any]) -> None:
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in ROOT.glob("fastllm/**/__init__.py")
    }
    assert set(project["tool"]["setuptools"]["packages"]) == found | {"fastllm.kernels"}


def test_the_entry_point_exists(project: dict[str, Any]) -> None:
    from fastllm.cli import main

    assert project["project"]["scripts"] == {"fastllm": "fastllm.cli:main"}
    assert callable(main)


def test_kernels_is_a_link_into_the_package() -> None:
    link = ROOT / "fastllm/kernels"
    assert link.is_symlink()
    assert os.readlink(link) == "../kernels"
    assert not (ROOT / "kernels/__init__.py").exists()  # it would hide another package's name


def test_public_names_exist() -> None:
    for name in fastllm.__all__:
        if name != "kernels":  # needs triton
            assert getattr(fastllm, name) is not None, name


def test_importing_the_package_is_cheap() -> None:
    code = "import fastllm, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_command_of_ci_is_the_command_of_the_readme() -> None:
    ci = ROOT / ".ci/run"
    assert os.access(ci, os.X_OK)
    assert "make test" in ci.read_text()
    readme = (ROOT / "README.md").read_text()
    assert "make test" in readme and "make demo" in readme


def test_the_readme_links_to_files_that_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_the_options_in_the_readme_exist() -> None:
    from fastllm.cli.commands import COMMANDS

    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^fastllm (\w+)((?:.*\\\n)*.*)$", text, flags=re.MULTILINE)
    assert {name for name, _ in commands} == set(COMMANDS)
    for name, arguments in commands:
        options = COMMANDS[name].options()
        known = {spelling for option in options for spelling in (option.name, *option.aliases)}
        given = re.findall(r"--([\w-]+)", arguments)
        assert set(given) <= known, f"{name}: {set(given) - known}"


def test_no_registry_hosts_in_the_tree() -> None:
    for path in tracked():
        if path.is_file() and path.suffix in ("", ".md", ".toml", ".py", ".txt", ".yaml", ".cfg"):
            text = path.read_text(encoding="utf-8", errors="ignore")
            assert not [host for host in HOSTS if host in text], path


def test_without_a_compiler_the_package_still_builds(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "setup.py", "build_ext"),
            *("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")),
        ],
        cwd=ROOT,
        env={**os.environ, "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler was found" in done.stdout + done.stderr
    assert not list((tmp_path / "lib").rglob("*.so"))
