"""The verb ``route``. Importing this file imports no vLLM."""

import argparse
import re
from pathlib import Path

from matgptq_vllm.core.errors import InputError
from serve.router.haproxy import RouterOptions, configuration
from serve.router.replicas import KEY_VARIABLE, ask, classes_of, parse_replica

DESCRIPTION = f"""\
Write the configuration of an HAProxy that puts several replicas behind one address. Requests that name a precision go to
the narrowest replica that holds it and has room; all others to the widest that has room and can meet their budget. The
replicas must be running: they are asked what they hold, with the key in {KEY_VARIABLE} if they want one."""

EPILOG = """\
examples:
  matgptq route --replica wide=http://10.0.0.1:8000 --replica narrow=http://10.0.0.2:8000 --out haproxy.cfg
  haproxy -f haproxy.cfg
"""


def add_verbs(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the verb; its ``run(namespace)`` returns an exit status and raises MatGPTQError."""
    verb = subparsers.add_parser(
        "route",
        help="put several replicas behind one address",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verb.add_argument("--replica", action="append", required=True, metavar="NAME=URL", help="a running replica; once for each")
    verb.add_argument("--out", type=Path, required=True, metavar="FILE", help="configuration to write")
    verb.add_argument(
        "--listen", default=RouterOptions.listen, metavar="[HOST]:PORT", help="for clients (default: %(default)s)"
    )
    verb.add_argument(
        "--metrics", default=RouterOptions.metrics, metavar="HOST:PORT", help="for Prometheus (default: %(default)s)"
    )
    verb.add_argument(
        "--slots",
        type=int,
        default=RouterOptions.slots,
        metavar="N",
        help="requests that each replica has room for at a time (default: %(default)s)",
    )
    verb.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Ask the replicas and write the file.

    Raises:
        InputError: an option is wrong, or a replica does not answer.
    """
    for option in ("listen", "metrics"):
        address = getattr(namespace, option)
        if not re.fullmatch(r"[A-Za-z0-9.*\[\]:-]*:\d+", address):
            raise InputError(f"--{option} {address!r} is not [HOST]:PORT, such as :8080 or 127.0.0.1:8405")
    if namespace.slots < 1:
        raise InputError(f"--slots {namespace.slots} leaves no room for any request; give a number from 1")
    options = RouterOptions(listen=namespace.listen, metrics=namespace.metrics, slots=namespace.slots)
    replicas = [ask(*parse_replica(text)) for text in namespace.replica]
    classes = classes_of(replicas)
    namespace.out.write_text(configuration(classes, options), encoding="utf-8")
    for one in classes:
        names = ", ".join(member.name for member in one.members)
        print(f"{names}: {', '.join(one.precisions)}")
    print(f"written: {namespace.out}; start it with `haproxy -f {namespace.out}`")
    return 0
