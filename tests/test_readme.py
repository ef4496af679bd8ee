"""The README is true: its commands exist with these options, and its tables are those of the files."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from edgekit.cli import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("edgekit ")
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_of_the_readme_is_understood(command):
    name, *arguments = command
    assert cli.commands[name].make_context(name, list(arguments)).params


def test_the_readme_shows_commands():
    assert len(COMMANDS) >= 5


def test_every_command_stands_in_the_readme():
    missing = [name for name in cli.commands if f"`{name}`" not in README]
    assert not missing


@pytest.mark.parametrize("name", ["quickstart", "test"])
def test_the_two_set_up_commands_are_targets_of_the_makefile(name):
    assert f"make {name}" in README
    assert re.search(rf"^{name}: setup", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_tables_of_the_readme_are_up_to_date():
    checked = [sys.executable, "scripts/readme_tables.py", "--check"]
    done = subprocess.run(checked, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_row_that_a_record_kept_has_the_day_on_which_it_was_measured():
    engines = {"onnx": {"date": "2026-11-24T05:55:00Z"}, "linux-x86_64": {"date": "2026-11-29T05:55:00Z"}}
    host = {"cpu": {"model": "a chip", "features": ["avx2"]}, "kernel": "6.1"}
    record = {"host": host, "protocol": "by turns", "engines": engines, "date": "2026-11-29T05:55:00Z"}
    legend = tiny.script("scripts/readme_tables.py")._legend([record])
    assert legend == "A: a chip, avx2, kernel 6.1; by turns; 2026-11-24, 2026-11-29."


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_what_the_readme_links_to_is_there(link):
    assert (ROOT / link).exists()
