"""The configuration of HAProxy that routes by precision and budget. Written for HAProxy 2.6 and later.

Every class of replicas has two backends: ``named``, for requests that name a precision it holds, and ``auto``, for those that
leave the choice to the server. The servers of other classes stand behind both as backups, where they can answer the same: so a
request that was on its way to a replica that died goes on to one that lives.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matgptq_vllm.core.precision import AUTO, PRECISION_HEADER
from serve.router.replicas import ReplicaClass, RoutedReplica

BUDGET_HEADER = "X-Latency-Budget-Ms"


@dataclass(frozen=True)
class RouterOptions:
    """How the router behaves."""

    listen: str = ":8080"
    """ADDRESS:PORT for clients."""
    metrics: str = "127.0.0.1:8405"
    """ADDRESS:PORT for Prometheus."""
    slots: int = 32
    """Requests that a replica has room for at a time; more wait in the router."""
    queue_s: int = 60
    """Longest time that a request waits in the router."""
    answer_s: int = 600
    """Longest time without a byte from a replica."""
    body_bytes: int = 262144
    """Requests up to this size are read for their precision, and may be sent again."""


def configuration(classes: Sequence[ReplicaClass], options: RouterOptions) -> str:
    """The text of ``haproxy.cfg``; ``classes`` are widest first."""
    sections = [_head(options), _frontend(classes, options)]
    for one in classes:
        able = [other for other in classes if other is not one and set(other.precisions) >= set(one.precisions)]
        sections.append(_backend(f"named_{one.name}", one, _members(reversed(able))))
        later = classes[classes.index(one) + 1 :]
        wider = classes[: classes.index(one)]
        sections.append(_backend(f"auto_{one.name}", one, _members([*later, *reversed(wider)])))
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
    timeout queue {options.queue_s}s
    # Sent again, to another replica: what reached nobody, what a replica dropped before it answered a byte, and what a replica
    # that shuts down refused. Never what has begun to be answered.
    retries 3
    retry-on conn-failure empty-response 503
    option redispatch 1
    option httpchk GET /health
    http-check expect status 200
    default-server check inter 1s fall 2 rise 2 observe layer4 error-limit 1 on-error mark-down maxconn {options.slots}

frontend metrics
    bind {options.metrics}
    http-request set-log-level silent
    http-request use-service prometheus-exporter if {{ path /metrics }}
    http-request deny deny_status 404"""


def _frontend(classes: Sequence[ReplicaClass], options: RouterOptions) -> str:
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
        f"    acl open var(txn.asked) -m str {AUTO}",
    ]
    for one in classes:
        lines += [
            f"    # {one.name}: {', '.join(member.name for member in one.members)}",
            f"    http-request set-var(txn.{one.name}) be_conn(auto_{one.name})",
            f"    acl room_{one.name} be_conn_free(named_{one.name}),sub(txn.{one.name}) gt 0",
            f"    acl up_{one.name} nbsrv(named_{one.name}) gt 0",
            f"    acl holds_{one.name} var(txn.asked) -m str {' '.join(one.precisions)}",
        ]
        if one.fastest_ms is not None:
            # Whole milliseconds are compared: HAProxy reads 12.5 as 12.
            lines.append(f"    acl slow_{one.name} req.hdr_val({BUDGET_HEADER}) lt {math.floor(one.fastest_ms)}")
    narrow_first = list(reversed(classes))
    lines.append("    # A precision that is named: the narrowest class that holds it and has room; if none has, wait there.")
    lines += [f"    use_backend named_{one.name} if generates holds_{one.name} room_{one.name}" for one in narrow_first]
    lines += [f"    use_backend named_{one.name} if generates holds_{one.name} up_{one.name}" for one in narrow_first]
    lines.append(
        "    # No precision, or auto: the widest class that has room and is fast enough; if none has, wait for the narrowest."
    )
    for one in classes:
        fast = f" !slow_{one.name}" if one.fastest_ms is not None else ""
        choice = f"use_backend auto_{one.name} if generates room_{one.name}"
        lines += [f"    {choice} {condition}{fast}" for condition in ("open", "!asked")]
    lines += [
        f"    use_backend auto_{one.name} if generates up_{one.name} {condition}"
        for one in narrow_first
        for condition in ("open", "!asked")
    ]
    lines.append("    # Everything else, such as /v1/models, and precisions that nobody holds: the class that offers most.")
    lines.append(f"    default_backend auto_{classes[0].name}")
    return "\n".join(lines)


def _backend(name: str, members: ReplicaClass, backups: Sequence[RoutedReplica]) -> str:
    lines = [f"backend {name}", "    balance leastconn"]
    lines += [f"    server {member.name} {member.address}" for member in members.members]
    lines += [f"    server {member.name} {member.address} backup" for member in backups]
    return "\n".join(lines)


def _members(classes: Iterable[ReplicaClass]) -> list[RoutedReplica]:
    return [member for one in classes for member in one.members]
