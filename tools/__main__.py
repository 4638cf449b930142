"""`python -m tools notebooks | check | adopt | new`: see the Makefile."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.chapters import BookError
from tools.check import check
from tools.keep import adopt, keep
from tools.new import new

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools", description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help="project folder")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "notebooks", help="export, execute, write the twins"
    )
    command.add_argument("name", nargs="*", help="chapters (all of them if none)")
    command = commands.add_parser("check", help="list all that is stale or wrong")
    command = commands.add_parser(
        "adopt", help="carry a notebook's edits into the text"
    )
    command.add_argument("name")
    command = commands.add_parser("new", help="begin a chapter, in one step")
    command.add_argument("name", help="of the chapter and of its module")
    command.add_argument("title", help="the chapter's heading")
    command.add_argument("--after", default="", help="chapter that it follows")
    options = parser.parse_args(arguments)
    root = options.root.resolve()
    try:
        if options.command == "notebooks":
            done = 0
            for line in keep(root, options.name):
                print(line, flush=True)
                done += 1
            if not done:
                print("Nothing to do.")
        elif options.command == "check":
            faults = check(root)
            print(*faults, sep="\n", end="\n" * bool(faults), file=sys.stderr)
            print(
                f"{len(faults)} faults in the book"
                if faults
                else "The book is sound."
            )
            return bool(faults)
        elif options.command == "adopt":
            print(adopt(root, options.name))
        elif options.command == "new":
            print(new(root, options.name, options.title, options.after))
            print(*keep(root, [options.name]), sep="\n")
    except BookError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
