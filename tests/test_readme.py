"""The pages are true: their commands are understood, their links lead somewhere, their tables are those of files."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from edgekit import config, recipe
from edgekit.cli import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        *sorted(ROOT.glob("docs/*.md")),
        *sorted(ROOT.glob("examples/**/README.md")),
        *sorted(ROOT.glob("*/README.md")),
    )
}
# Ends of commands: `...` stands for more of them.
_SHELL = (";", "&&", "|", "...")


def _commands(page: str) -> list[list[str]]:
    """Return the commands of edgekit in the blocks of a page, each with its arguments."""
    found = []
    for block in re.findall(r"^ *```(?:sh|bash)?\n(.*?)^ *```$", page, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = re.split(r"^(?:\w+=\S+ +)*edgekit(?= |$)", line.strip(), maxsplit=1)
            if len(words) == 2:
                arguments = shlex.split(words[1], comments=True)
                found.append(arguments[: next((i for i, w in enumerate(arguments) if w in _SHELL), None)])
    return found


COMMANDS = [(page, command) for page, text in PAGES.items() for command in _commands(text)]
LINKS = sorted({(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)})


def _anchors(page: Path) -> set[str]:
    """Return what links into a page may name, as GitHub makes it of its headings."""
    headings = re.findall(r"^#+ +(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}: {' '.join(words)}" for page, words in COMMANDS])
def test_a_command_of_a_page_is_understood(page, command):
    name, *arguments = command
    told = cli.commands[name].make_context(name, list(arguments)).params
    assert told
    config.changed(recipe.load("quickstart"), told.get("overrides", ()))


def test_the_pages_show_commands():
    pages = [page for page, _ in COMMANDS]
    assert pages.count("README.md") >= 5
    assert {"docs/training.md", "docs/compare.md", "docs/devices.md", "examples/android/README.md"} <= set(pages)


def test_a_command_that_goes_on_in_the_next_line_or_has_a_setting_in_front_is_read_whole():
    lines = ("OMP_NUM_THREADS=1 edgekit train x \\", "  --json ...  # then", "python edgekit no")
    assert _commands("".join(f"  {line}\n" for line in ("```sh", *lines, "```"))) == [["train", "x", "--json"]]


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


@pytest.mark.parametrize(("page", "link"), [x for x in LINKS if ":" not in x[1]], ids=lambda value: value)
def test_what_a_page_links_to_is_there(page, link):
    path, _, anchor = link.partition("#")
    file = (ROOT / page).parent / path if path else ROOT / page
    assert file.exists()
    assert not anchor or anchor in _anchors(file)
