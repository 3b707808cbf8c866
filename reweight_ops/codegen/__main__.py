"""``python -m reweight_ops.codegen [--check]``."""

from __future__ import annotations

import argparse
import sys

from .._core.files import write_atomically
from . import ROOT, generated_files, stale_files


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reweight_ops.codegen", description="Write the generated files."
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit 1 and name the files that are stale",
    )
    check = parser.parse_args().check
    if not (ROOT / "csrc").is_dir():
        sys.exit(f"{ROOT} is not a checkout of the repository: the generated files are in docs/.")
    stale = stale_files()
    for path in stale:
        print(f"{path} {'is stale: run python -m reweight_ops.codegen' if check else 'written'}")
        if not check:
            write_atomically(ROOT / path, generated_files()[path])
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
