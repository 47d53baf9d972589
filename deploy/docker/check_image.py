#!/usr/bin/env python3
"""Start an image where no container engine runs, as its settings say, and use it on the CPU. Needs root and buildah.

The image is mounted read-only; only the places that a container engine is told to make writable can be written. The process
has the image's user, environment, entry point and command, no capabilities, and the network of this machine.

    deploy/docker/check_image.py IMAGE PARENT [--port 8000] [-- more arguments of matgptq serve]

Prints what was seen as JSON; exit status 1 if anything of it is wrong.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

TOKENS = 300
START_TIMEOUT_S = 600

EXPECTED = {
    "user": "1000",
    "capabilities": "0000000000000000",
    "root": "ro",
    "status": 200,
    "precision": "3",
    "status_while_draining": 503,
    "retry_after": "1",
    "stream_finished": True,
    "exit_status": 0,
}

# $1 mounted image, $2 parent, $3 user, $4 group, then the command.
ENTER = """
mount --bind "$1" "$1"
mount --rbind /dev "$1/dev"
mount -t proc proc "$1/proc"
mount --bind /sys "$1/sys"
mount -o remount,bind,ro "$1/sys"
mount --bind "$2" "$1/parent"
mount -o remount,bind,ro "$1/parent"
mount -t tmpfs tmpfs "$1/dev/shm"
mount -t tmpfs tmpfs "$1/tmp"
mount -t tmpfs -o "uid=$3,gid=$4" tmpfs "$1/home/matgptq"
mount -o remount,bind,ro "$1"
root=$1 user=$3 group=$4
shift 4
exec chroot "$root" setpriv --reuid "$user" --regid "$group" --clear-groups --inh-caps=-all --bounding-set=-all \\
    --no-new-privs "$@"
"""


def main() -> int:
    """Run the check; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image")
    parser.add_argument("parent")
    parser.add_argument("--port", type=int, default=8000)
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options = parser.parse_args(sys.argv[1:end])
    options.arguments = sys.argv[end + 1 :]
    container = buildah("from", options.image)
    try:
        seen = check(options, buildah("mount", container))
    finally:
        buildah("rm", container)
    wrong = [name for name, expected in EXPECTED.items() if seen[name] != expected]
    print(json.dumps({**seen, "wrong": wrong}, indent=1))
    return 1 if wrong else 0


def check(options: argparse.Namespace, root: str) -> dict[str, object]:
    """Start the server, ask it, and end it while it streams."""
    config = json.loads(buildah("inspect", "--type", "image", options.image))["Docker"]["config"]
    os.makedirs(f"{root}/parent", exist_ok=True)  # as an engine makes the mount point
    user, group = config["User"].split(":")
    command = [*config["Entrypoint"], *config["Cmd"], "--port", str(options.port), *options.arguments]
    started = time.monotonic()
    with tempfile.NamedTemporaryFile(prefix="check_image-", suffix=".log", delete=False) as log:
        enter = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-euc", ENTER, "sh"]
        place = [root, options.parent, user, group, "env", "-i", *config["Env"], "HOME=/home/matgptq"]
        server = subprocess.Popen([*enter, *place, *command], stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{options.port}"
    try:
        while ready(url) != 200:
            if server.poll() is not None or time.monotonic() - started > START_TIMEOUT_S:
                sys.exit(f"the server did not become ready; its log is {log.name}")
            time.sleep(0.5)
        seen = {"seconds_until_ready": round(time.monotonic() - started, 1)}
        with open(f"/proc/{server.pid}/task/{server.pid}/children", encoding="ascii") as children:
            process = int(children.read().split()[0])
        return {**seen, **confinement(process), **use(url, process), "exit_status": server.wait(60)}
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()


def confinement(process: int) -> dict[str, str]:
    """Who the process is, what it may, and how its root is mounted."""
    with open(f"/proc/{process}/status", encoding="utf-8") as file:
        fields = dict(line.split(":", 1) for line in file)
    with open(f"/proc/{process}/mounts", encoding="utf-8") as file:
        flags = {line.split()[1]: line.split()[3].split(",")[0] for line in file}
    return {"user": fields["Uid"].split()[0], "capabilities": fields["CapEff"].strip(), "root": flags["/"]}


def use(url: str, process: int) -> dict[str, object]:
    """Ask at a precision; then stream, send SIGTERM meanwhile, and ask again."""
    body = {"model": "/parent", "prompt": "The old man", "max_tokens": 8}
    status, headers = post(url, body, {"X-Precision": "3"})
    lines: list[bytes] = []
    begun = threading.Event()

    def read() -> None:
        streamed = {"max_tokens": TOKENS, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        with urllib.request.urlopen(request(url, {**body, **streamed})) as answer:
            for line in answer:
                lines.append(line)
                begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    begun.wait(60)
    os.kill(process, signal.SIGTERM)
    time.sleep(0.2)
    refused, refused_headers = post(url, body, {})
    reader.join(300)
    # By the usage, since a chunk may have several tokens.
    usage = [json.loads(line[6:]).get("usage") for line in lines if line.startswith(b"data: {")]
    whole = b"data: [DONE]\n" in lines and usage[-1]["completion_tokens"] == TOKENS
    return {
        "status": status,
        "precision": headers.get("X-Precision"),
        "status_while_draining": refused,
        "retry_after": refused_headers.get("Retry-After"),
        "stream_finished": whole,
    }


def ready(url: str) -> int | None:
    """Status of GET /ready; None if nobody listens."""
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def post(url: str, body: dict[str, object], headers: dict[str, str]) -> tuple[int, dict[str, str]]:
    """Status and headers of the answer."""
    try:
        with urllib.request.urlopen(request(url, body, headers), timeout=120) as answer:
            return answer.status, {name.title(): value for name, value in answer.headers.items()}
    except urllib.error.HTTPError as error:
        return error.code, {name.title(): value for name, value in error.headers.items()}


def request(url: str, body: dict[str, object], headers: dict[str, str] | None = None) -> urllib.request.Request:
    """A completion request."""
    json_type = {"Content-Type": "application/json"}
    return urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {**json_type, **(headers or {})})


def buildah(*arguments: str) -> str:
    """What buildah prints."""
    return subprocess.run(["buildah", *arguments], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
