"""The command ``matgptq``: one verb per job. Verbs import what they need only when they run."""

import argparse
import sys
from collections.abc import Sequence

import calibrate.cli
import loadtests.cli
import matgptq_vllm.kernels.tune.cli
import serve.cli
import serve.keys_cli
import serve.router.cli
from matgptq_vllm import __version__
from matgptq_vllm.core.errors import MatGPTQError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status (2: wrong input or file, 1: the machine failed it)."""
    parser = argparse.ArgumentParser(
        prog="matgptq",
        description="Calibrate an 8-bit parent once; serve every slice width of it, per request, through vLLM.",
    )
    parser.add_argument("--version", action="version", version=f"matgptq-vllm {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    calibrate.cli.add_verbs(verbs)
    serve.cli.add_verbs(verbs)
    serve.keys_cli.add_verbs(verbs)
    matgptq_vllm.kernels.tune.cli.add_verbs(verbs)
    loadtests.cli.add_verbs(verbs)
    serve.router.cli.add_verbs(verbs)
    namespace = parser.parse_args(arguments)
    try:
        return namespace.run(namespace)
    except MatGPTQError as error:
        print(f"matgptq: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("matgptq: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"matgptq: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
