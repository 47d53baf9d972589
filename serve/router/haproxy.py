"""The configuration of HAProxy that routes by precision and budget. Written for HAProxy 2.6 and later.

Precisions that the same replicas hold are a group. Each group has a backend for every class of replicas in it, whose servers
take its requests, with those of the group's other classes as backups; ``auto`` is a group of all classes. So a request that was
on its way to a replica that died goes on to one that can answer the same.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matgptq_vllm.core.precision import AUTO, PRECISION_HEADER
from serve.router.replicas import ReplicaClass

BUDGET_HEADER = "X-Latency-Budget-Ms"


@dataclass(frozen=True)
class RouterOptions:
    """How the router behaves."""

    listen: str = ":8080"
    """ADDRESS:PORT for clients."""
    metrics: str = "127.0.0.1:8405"
    """ADDRESS:PORT for Prometheus."""
    slots: int = 32
    """Requests that a replica has room for at a time. Where no replica has room, more are sent all the same, and wait there."""
    answer_s: int = 600
    """Longest time without a byte from a replica."""
    body_bytes: int = 262144
    """Requests up to this size are read for their precision, and may be sent again."""


@dataclass(frozen=True)
class Group:
    """Precisions and the classes that hold them."""

    name: str
    precisions: tuple[str, ...]
    """Empty: those that leave the choice to the server."""
    classes: tuple[ReplicaClass, ...]
    """In the order in which they are tried."""

    def backend(self, primary: ReplicaClass) -> str:
        """Name of the backend for requests that are sent to ``primary``."""
        return f"{self.name}_{primary.name}"


def groups_of(classes: Sequence[ReplicaClass]) -> list[Group]:
    """All groups; ``classes`` are widest first. The last one is that of ``auto``."""
    holders: dict[tuple[ReplicaClass, ...], list[str]] = {}
    for precision in dict.fromkeys(name for one in classes for name in one.precisions):
        # The narrowest first: it leaves room for those that need a wide one.
        able = tuple(one for one in reversed(classes) if precision in one.precisions)
        holders.setdefault(able, []).append(precision)
    named = [Group(f"group{number}", tuple(names), able) for number, (able, names) in enumerate(holders.items())]
    return [*named, Group(AUTO, (), tuple(classes))]


def configuration(classes: Sequence[ReplicaClass], options: RouterOptions) -> str:
    """The text of ``haproxy.cfg``; ``classes`` are widest first."""
    groups = groups_of(classes)
    sections = [_head(options), _frontend(classes, groups, options)]
    # Nothing is sent to these: they say how many replicas of a class are up.
    sections += [_backend(f"up_{one.name}", one, ()) for one in classes]
    for group in groups:
        for one in group.classes:
            sections.append(_backend(group.backend(one), one, (other for other in group.classes if other is not one)))
    return "\n\n".join(sections) + "\n"


def _head(options: RouterOptions) -> str:
    return f"""\
global
    log stdout format raw local0
    # A request body is read up to this size, for the precision in it, and kept so that it can be sent again.
    tune.bufsize {options.body_bytes}

defaults
    mode http
    log global
    option httplog
    option dontlognull
    # Tokens are passed on as they come.
    option http-no-delay
    timeout connect 2s
    timeout client {options.answer_s}s
    timeout server {options.answer_s}s
    timeout http-request 30s
    # Sent again, if possible to another replica: what reached nobody, what a replica dropped before it answered a byte, and
    # what a replica that shuts down refused. Never what has begun to be answered.
    retries 3
    retry-on conn-failure empty-response 503
    option redispatch 1
    option httpchk GET /health
    http-check expect status 200
    default-server check inter 1s fall 1 rise 2 observe layer4 error-limit 1 on-error mark-down

frontend metrics
    bind {options.metrics}
    http-request set-log-level silent
    http-request use-service prometheus-exporter if {{ path /metrics }}
    http-request deny deny_status 404"""


def _frontend(classes: Sequence[ReplicaClass], groups: Sequence[Group], options: RouterOptions) -> str:
    *named, auto = groups
    lines = [
        "frontend matgptq",
        f"    bind {options.listen}",
        "    acl generates method POST",
        "    http-request wait-for-body time 30s if generates",
        "    # The precision that is asked for, in the order in which a replica looks for it.",
        f"    http-request set-var(txn.asked) req.hdr({PRECISION_HEADER}) if generates",
        "    acl asked var(txn.asked) -m found",
        "    http-request set-var(txn.asked) req.body,json_query('$.precision') if generates !asked",
        "    http-request set-var(txn.asked) req.body,json_query('$.vllm_xargs.precision') if generates !asked",
        "    http-request set-var(txn.model) req.body,json_query('$.model') if generates !asked",
        "    http-request set-var(txn.asked) var(txn.model),field(2,@) if generates !asked { var(txn.model) -m sub @ }",
        f"    acl auto var(txn.asked) -m str {AUTO}",
    ]
    for one in classes:
        lines.append(f"    # {one.name}: {', '.join(member.name for member in one.members)}")
        lines.append(f"    http-request set-var(txn.{one.name}) int(0)")
        for group in groups:
            if one in group.classes:
                lines.append(f"    http-request set-var(txn.{one.name}) be_conn({group.backend(one)}),add(txn.{one.name})")
        lines.append(f"    acl up_{one.name} nbsrv(up_{one.name}) gt 0")
        lines.append(f"    acl room_{one.name} nbsrv(up_{one.name}),mul({options.slots}),sub(txn.{one.name}) gt 0")
        if one.fastest_ms is not None:
            # HAProxy compares whole numbers.
            lines.append(f"    acl slow_{one.name} req.hdr({BUDGET_HEADER}),field(1,.) -m int lt {math.floor(one.fastest_ms)}")
    lines.append("    # A precision that is named: the narrowest class that holds it and has room; if none has, the narrowest.")
    for group in named:
        lines.append(f"    acl {group.name} var(txn.asked) -m str {' '.join(group.precisions)}")
        for state in ("room", "up"):
            lines += [f"    use_backend {group.backend(one)} if {group.name} {state}_{one.name}" for one in group.classes]
        lines.append(f"    use_backend {group.backend(group.classes[0])} if {group.name}")
    lines.append("    # Any other: the widest class that has room and is fast enough; if none is, the narrowest.")
    for one in classes:
        fast = f" !slow_{one.name}" if one.fastest_ms is not None else ""
        lines += [
            f"    use_backend {auto.backend(one)} if generates {open} room_{one.name}{fast}" for open in ("auto", "!asked")
        ]
    for one in reversed(classes):
        lines += [f"    use_backend {auto.backend(one)} if generates {open} up_{one.name}" for open in ("auto", "!asked")]
    lines.append("    # Everything else, such as /v1/models, and precisions that nobody holds: the class that offers most.")
    lines.append(f"    default_backend {auto.backend(classes[0])}")
    return "\n".join(lines)


def _backend(name: str, primary: ReplicaClass, backups: Iterable[ReplicaClass]) -> str:
    lines = [f"backend {name}", "    balance leastconn"]
    lines += [f"    server {member.name} {member.address}" for member in primary.members]
    lines += [f"    server {member.name} {member.address} backup" for one in backups for member in one.members]
    return "\n".join(lines)
