"""`python -m splitserve.parallel.follower`: a rank that another process of its node started."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from splitserve.config import EXIT_CONFIG
from splitserve.errors import CheckpointError, ConfigError
from splitserve.parallel.ending import Ending
from splitserve.parallel.follow import OpenRank, follow
from splitserve.parallel.rendezvous import LOOPBACK, ParallelConfig
from splitserve.rpc.lifecycle import die_with_parent


def read_arguments(argv: Sequence[str]) -> ParallelConfig:
    """The rank that `children.LocalRanks` describes."""
    parser = argparse.ArgumentParser(prog="splitserve.parallel.follower", description=__doc__)
    for name in ("rank", "size", "nnodes", "local-rank", "local-size"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--meeting-folder", default="")
    parser.add_argument("--master-addr", default=LOOPBACK)
    parser.add_argument("--master-port", type=int, default=0)
    return ParallelConfig(**vars(parser.parse_args(argv)))


def run_child(open_rank: OpenRank, argv: Sequence[str] | None = None) -> None:
    """Follow rank 0 until it says stop; exits with 2 if it cannot start."""
    die_with_parent(signal.SIGKILL)
    config = read_arguments(sys.argv[1:] if argv is None else argv)
    try:
        follow(config, open_rank, Ending(), is_child=True)
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error.message}", file=sys.stderr)
        sys.exit(EXIT_CONFIG)


if __name__ == "__main__":
    from splitserve.parallel.opening import open_rank

    run_child(open_rank)
