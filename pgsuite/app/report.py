"""Compare runs: pgsuite report runs/ppo-CartPole runs/trpo-CartPole

Writes a page to open in a browser, its pictures, and its tables in Markdown.
"""

import argparse
import shlex
import sys
from pathlib import Path

from pgsuite.errors import UserError, command
from pgsuite.reports import report


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run directories, directories that hold some at any depth, or globs")
    parser.add_argument("--out", type=Path, default=Path("report"), help="directory to write to (default: report)")
    arguments = parser.parse_args()
    try:
        for line in report(arguments.runs, arguments.out, f"{command('report')} {shlex.join(sys.argv[1:])}"):
            print(line)
    except UserError as error:
        sys.exit(f"error: {error}")
