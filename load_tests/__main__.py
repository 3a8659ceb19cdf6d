"""Measure the service beside its peers and its limit: `python -m load_tests`, or `make bench`.

    python -m load_tests                              all sections; half an hour
    python -m load_tests --only grpc,image            some of them
    python -m load_tests peers install                the peers' environments, once
    python -m load_tests start                        start to ready, first requests beside later ones
    python -m load_tests tune                         the best settings for this machine

Whether the service is right, rather than how fast it is, say (each with a server of its own):

    python -m load_tests storm --times 1000           200 requests of every kind in flight together
    python -m load_tests soak --minutes 5             80 % of what it can do, every answer checked
    python -m load_tests schema --minutes 5           what its own description allows, and what it does not
    python -m load_tests fuzz --minutes 5             nonsense at both doors

Every round starts each server once, one at a time, and every other round goes the other way
round, so that a machine that drifts favours nobody. Ends with 1 if a target is missed or an
answer was wrong, with 2 if something could not be run, with 3 if the figures lie too far apart.
"""

import sys
from importlib import import_module
from typing import Final

from load_tests import bench
from load_tests.peers import environments

PROOFS: Final = ("storm", "soak", "schema", "fuzz")
"""Modules with a `main` of their own."""


def peers(arguments: list[str]) -> int:
    """Install the peers' environments, or list them."""
    known = environments.names()
    wanted = arguments[1:] or known
    if arguments[:1] not in (["install"], ["list"]) or set(wanted) - set(known):
        print(f"usage: python -m load_tests peers install|list [{'|'.join(known)} ...]", file=sys.stderr)
        return 2
    failed = False
    for peer in wanted:
        if arguments[0] == "install":
            try:
                print(f"{peer}: installing", flush=True)
                environments.install(peer)
            except environments.InstallFailed as error:
                print(error, file=sys.stderr)
                failed = True
        print(f"{peer}: {'installed' if environments.is_installed(peer) else 'not installed'}", flush=True)
    return int(failed)


def main(arguments: list[str]) -> int:
    """Do what the command line says."""
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command == "peers":
        return peers(rest)
    if command == "start":
        from load_tests import first_requests

        return first_requests.main(rest)
    if command == "tune":
        from load_tests import tune

        return tune.main(rest)
    if command in PROOFS:
        proof = import_module(f"load_tests.{command}")
        return int(proof.main(rest))
    return bench.main(arguments)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
