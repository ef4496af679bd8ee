"""Write the tables of README.md that come from files: the shipped weights, and the latency of their artifacts.

python scripts/readme_tables.py           # writes
python scripts/readme_tables.py --check   # exits with 1 when the README is not up to date
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from edgekit import zoo

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
LATENCY = ROOT / "results" / "benchmarks" / "latency.json"
SETS = {"set12": "Set12", "bsd68": "BSD68", "embedded-evaluation": "embedded"}


def main() -> None:
    """Write or check the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    text = README.read_text(encoding="utf-8")
    wanted = put(put(text, "zoo", zoo_table()), "latency", latency_table())
    if check:
        sys.exit(0 if text == wanted else f"{README.name}: its tables are old; run: python scripts/readme_tables.py")
    README.write_text(wanted, encoding="utf-8")


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
            figures = [m for m in card.measured if m.pictures == pictures]
            cells.append(" / ".join(f"{m.psnr_mdb / 1000:.2f}" for m in sorted(figures, key=lambda m: m.sigma)) or "-")
        trained = f"{card.trained['minutes']} min, {card.trained['device']}"
        lines.append(f"| `{name}` | {card.parameters:,} | {' | '.join(cells)} | {trained} |")
    return "\n".join(lines) + "\n"


def latency_table() -> str:
    """Return the ratio of the FP32 teacher's latency to each artifact's, from the recorded benchmark."""
    record = json.loads(LATENCY.read_text(encoding="utf-8"))
    lines = ["| model, engine, arithmetic | teacher FP32, ms | student, ms | ratio (95 % bound) |", "|---|---|---|---|"]
    for name, row in record["figures"].items():
        bound = f"{row['ratio']:.1f} ({row['low']:.1f} to {row['high']:.1f})"
        lines.append(f"| {name} | {row['teacher_ms']:.0f} | {row['student_ms']:.1f} | {bound} |")
    machine = f"{record['host']['cpu']['model']}, {', '.join(record['host']['cpu']['features'])}"
    return "\n".join([*lines, "", f"{machine}; {record['protocol']}; {record['date'][:10]}.", ""])


if __name__ == "__main__":
    main()
