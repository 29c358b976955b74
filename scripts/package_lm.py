"""Package a finished pretraining run: ``python scripts/package_lm.py RUN_DIR TARGET_DIR NOTES.yaml [--blimp FILE]``.

NOTES.yaml holds the texts of the card that cannot be measured: hardware, trials, limits, license.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import yaml

from softprompts.pretraining.package import package


def main() -> None:
    """Read the command line, package, print the measured values as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("notes", type=Path)
    parser.add_argument("--blimp", type=Path, help="BLiMP as one JSONL file")
    parser.add_argument("--pairs", type=int, help="pairs per BLiMP paradigm; default all")
    options = parser.parse_args()
    notes = yaml.safe_load(options.notes.read_text(encoding="utf-8"))
    values = package(
        options.run, options.target, notes=notes, blimp_path=options.blimp, pairs_per_paradigm=options.pairs
    )
    print(json.dumps(values, indent=1))


if __name__ == "__main__":
    main()
