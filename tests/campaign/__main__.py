"""`python -m tests.campaign KIND --count N --seed S`: many small attacks on one part of the library (docs/security.md).

Each case is made of its seed alone. A failure prints the command that repeats it; the status is 1 if there was one.
"""

import argparse
import sys

from . import KINDS
from .runner import MEMORY, SECONDS, campaign


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--count", type=int, default=1000, help="cases (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others follow (default: 0)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that one case may take (default: %(default)s)")
    parser.add_argument("--memory", type=float, default=MEMORY, help="GiB of one process (default: %(default)s)")
    args = parser.parse_args()
    result = campaign(
        args.kind, args.count, args.seed, args.seconds, args.memory, say=lambda line: print(line, flush=True)
    )
    print(result.summary())
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
