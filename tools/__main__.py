"""`python -m tools notebooks | check | adopt | new`: see the Makefile."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.chapters import BookError
from tools.keep import adopt, keep

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools", description=__doc__)
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="the project's folder"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "notebooks", help="export, execute, write the twins"
    )
    command.add_argument("name", nargs="*", help="chapters (all of them if none)")
    command = commands.add_parser("check", help="list all that is stale or wrong")
    command = commands.add_parser(
        "adopt", help="carry notebook edits into the text"
    )
    command.add_argument("name")
    options = parser.parse_args(arguments)
    root = options.root.resolve()
    try:
        if options.command == "notebooks":
            print(*(keep(root, options.name) or ["Nothing to do."]), sep="\n")
        elif options.command == "adopt":
            print(adopt(root, options.name))
    except BookError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
