"""Write the tables that come from files: shipped weights and latencies in README.md, INT8 in docs/int8.md.

python scripts/readme_tables.py           # writes
python scripts/readme_tables.py --check   # exits with 1 when a table is not up to date
"""

from __future__ import annotations

import argparse
import json
import string
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekit import zoo
from edgekit.files import atomic_file

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
INT8_PAGE = ROOT / "docs" / "int8.md"
INT8 = ROOT / "results" / "int8"
# Name on a card -> heading. Networks for colour are measured on the same pictures in colour.
SETS = {"set12": "Set12", "bsd68": "BSD68", "embedded-evaluation": "embedded"}
IN_COLOR = {"bsd68": "cbsd68"}


def main() -> None:
    """Write or check the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    pages = {
        README: {"zoo": zoo_table, "latency": latency_table},
        INT8_PAGE: {"int8": int8_table, "int8 without VNNI": lambda: int8_table(INT8 / "avx2")},
    }
    for page, tables in pages.items():
        text = wanted = page.read_text(encoding="utf-8")
        for mark, table in tables.items():
            wanted = put(wanted, mark, table())
        if check and text != wanted:
            sys.exit(f"{page.name}: its tables are old; run: python scripts/readme_tables.py")
        if text != wanted:
            with atomic_file(page) as temporary:
                temporary.write_text(wanted, encoding="utf-8")


def put(text: str, mark: str, table: str) -> str:
    """Return the text with a table between its marks."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    head, _, rest = text.partition(begin)
    return f"{head}{begin}{table}{end}{rest.partition(end)[2]}"


def zoo_table() -> str:
    """Return the PSNR of the shipped weights at sigma 15 / 25 / 50, in dB, by set."""
    lines = [
        f"| PSNR in dB at sigma 15 / 25 / 50 | parameters | {' | '.join(SETS.values())} | trained |",
        "|---|---|---|---|---|---|",
    ]
    for name in zoo.names():
        card = zoo.card(name)
        cells = []
        for pictures in SETS:
            color = card.options.get("channels") == 3
            name_there = IN_COLOR.get(pictures, pictures) if color else pictures
            figures = sorted((m for m in card.measured if m.pictures == name_there), key=lambda m: m.sigma)
            cell = " / ".join(f"{m.psnr_mdb / 1000:.2f}" for m in figures) or "-"
            cells.append(f"{cell} in colour" if color and figures else cell)
        trained = f"{card.trained['minutes']} min, {card.trained['device']}"
        lines.append(f"| `{name}` | {card.parameters:,} | {' | '.join(cells)} | {trained} |")
    return "\n".join(lines) + "\n"


def latency_table() -> str:
    """Return how much quicker than the FP32 teacher each INT8 artifact is, from the recorded benchmarks."""
    records = [r for r in _records() if not r["settings"]]
    machines = _machines(records)
    lines = [
        "| model, target | on | teacher FP32, ms | artifact INT8, ms | ratio (95 % bound) | to the teacher in PyTorch "
        "| loss on Set12 at sigma 25, dB |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        letter = machines[_machine(record)]
        for name, row in record["engines"].items():
            teacher = row["against_teacher"]["256"]
            times = f"{teacher['slow_ms']:.0f} | {teacher['int8_ms']:.1f} | {_ratio(teacher, 1)}"
            pytorch = _ratio(row["against_teacher_in_pytorch"]["256"], 1)
            loss = row["loss_mdb"]["set12 25"]["mean"] / 1000
            lines.append(f"| `{record['model']}`, `{name}` | {letter} | {times} | {pytorch} | {loss:.3f} |")
    return "\n".join([*lines, "", _legend(records), ""])


def int8_table(folder: Path = INT8) -> str:
    """Return what INT8 costs and brings, for each student and engine, from the recorded benchmarks in a folder."""
    lines = [
        "| | on | loss on Set12 at sigma 15 / 25 / 50, dB | worst | on BSD68 | worst | in float | integer MACs "
        "| to FP32, 256x256 | 512x512 | 1024x1024 | to the FP32 teacher |",
        f"|{'---|' * 12}",
    ]
    records = _records(folder)
    machines = _machines(records)
    for record in records:
        for name, row in record["engines"].items():
            cells = [", ".join(f"`{part}`" for part in (record["model"], name, *record["settings"]))]
            cells.append(machines[_machine(record)])
            for pictures in ("set12", "bsd68"):
                losses = [row["loss_mdb"][f"{pictures} {sigma}"] for sigma in (15, 25, 50)]
                cells.append(" / ".join(f"{loss['mean'] / 1000:.3f}" for loss in losses))
                cells.append(f"{max(loss['worst'] for loss in losses) / 1000:.2f}")
            cells.append(_in_float(row["quantization"]))
            cells.append(f"{row['integer_macs_permille'] / 10:.1f} %")
            cells += [_ratio(row["against_fp32"].get(side)) for side in ("256", "512", "1024")]
            cells.append(_ratio(row["against_teacher"]["256"]))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _legend(records), ""])


def _records(folder: Path = INT8) -> list[dict[str, Any]]:
    """Return the records of benchmarks/int8.py."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def _machine(record: dict[str, Any]) -> str:
    """Return what a record was measured on, and how."""
    host = record["host"]
    cpu, kernel = host["cpu"], f"kernel {host['kernel']}"
    return f"{cpu['model']}, {', '.join(cpu['features'])}, {kernel}; {record['protocol']}"


def _machines(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return a letter for each machine and protocol."""
    found = sorted({_machine(record) for record in records})
    return dict(zip(found, string.ascii_uppercase, strict=False))


def _legend(records: Sequence[dict[str, Any]]) -> str:
    """Return what each letter stands for, with the days of its rows: a record keeps some of earlier days."""
    lines = []
    for machine, letter in _machines(records).items():
        rows = [row for record in records if _machine(record) == machine for row in record["engines"].values()]
        days = sorted({row["date"][:10] for row in rows})
        lines.append(f"{letter}: {machine}; {', '.join(days)}.")
    return "  \n".join(lines)


def _in_float(facts: dict[str, list[str]]) -> str:
    """Return what the search and the ends left in float: convolutions by their part, additions together or counted."""
    others = [name for name in facts["released"] if name not in facts["float_nodes"]]
    together = [name for name in others if name.startswith("additions")]
    single = [f"{count} additions"] if (count := len(others) - len(together)) else []
    parts = dict.fromkeys("attention" if "/attention/" in name else name.split("/")[1] for name in facts["float_nodes"])
    return ", ".join([*parts, *together, *single]) or "nothing"


def _ratio(found: dict[str, float] | None, digits: int = 2) -> str:
    if found is None:
        return "-"
    return f"{found['ratio']:.{digits}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"


if __name__ == "__main__":
    main()
