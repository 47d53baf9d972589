"""Who may import whom. The table below is the architecture; the rest of the file enforces it on every import statement."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CORE = "matgptq_vllm.core"
PLAIN_CORE = tuple(
    f"{CORE}.{name}"
    for name in (
        "errors",
        "folder_swap",
        "manifest",
        "parent",
        "precision",
        "profile",
        "quality",
        "replica",
        "resident_bytes",
        "safetensors_header",
        "shapes",
        "storage",
        "summary",
        "width_limit",
    )
)
"""The part of core that needs the standard library only, so that HTTP and command-line code can use it."""

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    # Package or module: the prefixes that it may import besides the standard library. The longest name wins. Every
    # package, and every module directly in matgptq_vllm/, needs a row of its own.
    "matgptq_vllm": (),
    "matgptq_vllm.cli": (
        "matgptq_vllm.__init__", f"{CORE}.errors", "matgptq_vllm.kernels.tune.cli", "calibrate.cli", "serve.cli",
        "serve.keys_cli", "serve.router.cli", "loadtests.cli",
    ),
    **dict.fromkeys(PLAIN_CORE, PLAIN_CORE),
    CORE: (CORE, "torch", "safetensors"),
    "matgptq_vllm.kernels": (CORE, "matgptq_vllm.kernels", "torch", "triton"),
    "matgptq_vllm.kernels.compile_ahead": (CORE, "matgptq_vllm.kernels", "filelock", "torch", "triton"),
    "matgptq_vllm.kernels.bench": (CORE, "matgptq_vllm.kernels", "torch"),
    "matgptq_vllm.kernels.tables": (*PLAIN_CORE, "matgptq_vllm.kernels.config"),
    "matgptq_vllm.kernels.tune": (CORE, "matgptq_vllm.kernels", "torch"),
    "matgptq_vllm.kernels.tune.cli": (
        *PLAIN_CORE, "matgptq_vllm.kernels.bench.shapes", "matgptq_vllm.kernels.tables", "matgptq_vllm.kernels.tune",
    ),
    "matgptq_vllm.kernels.tune.options": (
        *PLAIN_CORE, "matgptq_vllm.kernels.bench.shapes", "matgptq_vllm.kernels.tables",
    ),
    "matgptq_vllm.kernels.bench.peers": (CORE, "matgptq_vllm.kernels.bench", "torch", "vllm"),
    "matgptq_vllm.kernels.bench.plot": (CORE, "matgptq_vllm.kernels.bench", "matplotlib"),
    "matgptq_vllm.engine": (CORE, "matgptq_vllm.engine", "matgptq_vllm.kernels.segments", "numpy", "torch"),
    "matgptq_vllm.compat": (
        CORE, "matgptq_vllm.engine", "matgptq_vllm.compat", "matgptq_vllm.kernels.resident", "huggingface_hub", "numpy",
        "packaging", "torch", "vllm",
    ),
    "matgptq_vllm.plugin": (
        CORE, "matgptq_vllm.kernels.capability", "matgptq_vllm.kernels.compile_ahead", "matgptq_vllm.kernels.ops",
        "matgptq_vllm.kernels.resident", "matgptq_vllm.engine", "matgptq_vllm.compat", "matgptq_vllm.plugin", "torch", "vllm",
    ),
    "calibrate": (
        CORE, "calibrate", "matgptq_vllm.__init__", "numpy", "safetensors", "torch", "tqdm", "transformers", "datasets",
    ),
    "calibrate.column_kernel": (CORE, "calibrate", "torch", "triton"),
    "calibrate.fetch": (CORE, "calibrate", "huggingface_hub", "tqdm"),
    "calibrate.evaluate": (CORE, "calibrate", "torch", "tqdm", "transformers"),
    "calibrate.evaluate.endpoint": (CORE, "calibrate.evaluate", "lm_eval"),
    "calibrate.evaluate.plot": (CORE, "calibrate.evaluate", "matplotlib"),
    "calibrate.evaluate.tasks": (CORE, "calibrate", "lm_eval", "transformers"),
    "calibrate.search": (CORE, "calibrate", "torch", "tqdm", "transformers"),
    "calibrate.search.evolution": ("calibrate.search.space", "calibrate.search.units"),
    "calibrate.search.knapsack": ("calibrate.search.space", "calibrate.search.units", "numpy"),
    "calibrate.search.space": (f"{CORE}.precision", "calibrate.search.units"),
    "calibrate.exchange": (CORE, "calibrate", "safetensors", "torch", "transformers"),
    "serve": (*PLAIN_CORE, "serve", "fastapi", "prometheus_client", "starlette"),
    "serve.endpoints": (*PLAIN_CORE, "serve", "fastapi", "matgptq_vllm.__init__", "starlette"),
    "serve.trial_request": (*PLAIN_CORE, "serve", "vllm"),
    "serve.width_limit": (*PLAIN_CORE, "serve", "vllm"),
    "serve.playground": ("serve.playground", "fastapi", "starlette"),
    "serve.router": (*PLAIN_CORE, "serve.router"),
    "serve.tenant_file": (*PLAIN_CORE, "serve", "yaml"),
    "serve.tracing": (*PLAIN_CORE, "serve", "opentelemetry", "starlette"),
    "serve.yaml_nodes": (*PLAIN_CORE, "serve", "yaml"),
    "serve.cli": (*PLAIN_CORE, "serve", "vllm"),
    "serve.stat_logger": (*PLAIN_CORE, "serve", "prometheus_client", "vllm"),
    "deploy.docker.check_image": (),
    "loadtests.engine": (*PLAIN_CORE, "loadtests", "matplotlib"),
    "loadtests.engine.loading": (*PLAIN_CORE, "loadtests", "torch", "vllm"),
    "loadtests.engine.random_models": (
        *PLAIN_CORE, f"{CORE}.checkpoint_writer", f"{CORE}.slicing", "loadtests.engine", "torch", "safetensors", "tokenizers",
        "transformers",
    ),
    "loadtests.engine.measure": (*PLAIN_CORE, "loadtests.engine", "torch", "vllm"),
    "loadtests.engine.worker": ("loadtests.engine.kernel_times", "torch"),
    "loadtests.metrics_text": ("prometheus_client",),
    "loadtests.timeline": ("loadtests", "httpx", "matplotlib"),
    "loadtests.soak": ("loadtests", "torch", "vllm"),
    "loadtests": (f"{CORE}.errors", "loadtests", "httpx"),
    "loadtests.campaign": (f"{CORE}.errors", "loadtests", "tqdm"),
    "loadtests.comparison": ("loadtests", "numpy"),
    "loadtests.generator": (f"{CORE}.errors", "loadtests", "aiohttp", "vllm"),
    "loadtests.plots": ("loadtests", "matplotlib", "numpy"),
    "loadtests.watch": (f"{CORE}.errors", "loadtests", "httpx", "numpy", "psutil"),
    "loadtests.statistics": ("loadtests", "numpy"),
    "loadtests.simulation": (f"{CORE}.errors", "loadtests", "serve", "matplotlib"),
}  # fmt: skip

PRIVATE: dict[str, tuple[str, ...]] = {
    # Whatever prefixes other rows allow: package -> the packages and modules whose own code may import it.
    "matgptq_vllm.kernels.bench": ("matgptq_vllm.kernels.bench", "matgptq_vllm.kernels.tune"),
    "matgptq_vllm.kernels.tune": ("matgptq_vllm.kernels.tune", "matgptq_vllm.cli"),
}

NOT_LAYERED = {"tests", "examples", "build", "dist"}
"""Folders of the repository that may hold Python without being packages of the product."""

OURS = {name.partition(".")[0] for name in MAY_IMPORT}

STAYS_OUT = [
    # Importing the module on the left leaves everything on the right unloaded.
    ("matgptq_vllm", ("torch", "vllm", "numpy", "transformers", "safetensors")),
    *((module, ("torch", "vllm", "numpy", "transformers", "safetensors")) for module in PLAIN_CORE),
    ("matgptq_vllm.core.checkpoint", ("vllm", "triton", "transformers")),
    ("matgptq_vllm.core.checkpoint_writer", ("vllm", "triton", "transformers")),
    ("matgptq_vllm.kernels.bench.__main__", ("vllm", "matplotlib", "transformers")),
    ("matgptq_vllm.kernels.bench.measure", ("vllm", "matplotlib", "transformers")),
    ("calibrate.cli", ("torch", "vllm", "transformers")),
    ("calibrate.rounding", ("vllm", "triton", "transformers")),
    ("serve.cli", ("torch", "vllm", "transformers")),
    ("serve.keys_cli", ("torch", "vllm", "transformers", "yaml")),
    ("loadtests.cli", ("torch", "vllm", "numpy", "matplotlib")),
    ("matgptq_vllm.cli", ("torch", "vllm", "transformers")),
]


def python_files(root: Path) -> Iterator[tuple[str, Path]]:
    """Module name and file of all Python in the folders of ``root`` that are not exempt. A package is ``name.__init__``."""
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and not folder.name.startswith(".") and folder.name not in NOT_LAYERED:
            for path in sorted(folder.rglob("*.py")):
                yield ".".join(path.relative_to(root).with_suffix("").parts), path


def imports(module: str, tree: ast.AST, modules: set[str]) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that ``module`` imports anywhere, unless only for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and _is_type_checking(node.test):
            for other in node.orelse:
                yield from imports(module, ast.Module([other], []), modules)
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Of ``from package import name``, the module is package.name if there is such a file.
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                full = f"{source}.{alias.name}"
                is_module = full in modules or f"{full}.__init__" in modules
                yield node.lineno, full if is_module else source
        elif isinstance(node, ast.Call) and _is_dynamic_import(node.func):
            target = node.args[0] if node.args else None
            constant = isinstance(target, ast.Constant) and isinstance(target.value, str)
            yield node.lineno, target.value if constant else "<computed name>"  # type: ignore[union-attr]
        yield from imports(module, node, modules)


def violations(root: Path) -> list[str]:
    """Every breach of the table by the Python under ``root``, as ``file:line: what``."""
    files = dict(python_files(root))
    found = []
    for module, path in files.items():
        row = row_of(module)
        where = path.relative_to(root)
        if row is None:
            found.append(f"{where}: {module} has no row in MAY_IMPORT; decide what it may import")
            continue
        for line, target in imports(module, ast.parse(path.read_text(encoding="utf-8")), set(files)):
            name = f"{target}.__init__" if f"{target}.__init__" in files else target
            if name.partition(".")[0] in sys.stdlib_module_names:
                continue
            private = next((package for package in PRIVATE if _allowed(name, (package,))), None)
            if not _allowed(name, MAY_IMPORT[row]) or (private and not _allowed(module, PRIVATE[private])):
                found.append(f"{where}:{line}: {row} may not import {target}")
    return found


def row_of(module: str) -> str | None:
    """Name of the row that governs ``module``: its own, or that of the package that it lies in directly."""
    package, _, leaf = module.rpartition(".")
    if module in MAY_IMPORT and leaf != "__init__":
        return module
    if package == "matgptq_vllm" and leaf != "__init__":
        return None
    return package if package in MAY_IMPORT else None


def _allowed(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _is_dynamic_import(function: ast.expr) -> bool:
    return ast.unparse(function) in ("__import__", "import_module", "importlib.import_module")


def test_every_import_of_the_product_is_allowed() -> None:
    assert {module.partition(".")[0] for module, _ in python_files(ROOT)} >= {"matgptq_vllm", "calibrate", "serve"}
    assert violations(ROOT) == []


def test_every_row_names_something_that_exists() -> None:
    modules = {module for module, _ in python_files(ROOT)}
    rows = [row for row in MAY_IMPORT if row != "loadtests"]
    assert [row for row in rows if row not in modules and f"{row}.__init__" not in modules] == []


FORBIDDEN = [
    ("matgptq_vllm/core/x.py", "import vllm"),
    ("matgptq_vllm/core/x.py", "import triton.language as tl"),
    ("matgptq_vllm/core/x.py", "from matgptq_vllm.kernels import ops"),
    ("matgptq_vllm/core/x.py", "from ..engine import replica"),
    ("matgptq_vllm/core/x.py", "def f():\n    import transformers"),
    (
        "matgptq_vllm/core/x.py",
        "class A:\n    async def f(self):\n        if self:\n            from vllm.config import VllmConfig",
    ),
    ("matgptq_vllm/core/x.py", "try:\n    import vllm\nexcept ImportError:\n    pass"),
    ("matgptq_vllm/core/x.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import vllm"),
    ("matgptq_vllm/core/x.py", "if not TYPE_CHECKING:\n    import vllm"),
    ("matgptq_vllm/core/x.py", "import importlib\nimportlib.import_module('vllm')"),
    ("matgptq_vllm/core/x.py", "import importlib\nname = 'v'\nimportlib.import_module(name)"),
    ("matgptq_vllm/core/x.py", "__import__('vllm')"),
    ("matgptq_vllm/core/x.py", "import torchvision"),
    ("matgptq_vllm/core/precision.py", "import torch"),
    ("matgptq_vllm/core/profile.py", "from matgptq_vllm.core.slicing import levels"),
    ("matgptq_vllm/core/errors.py", "import safetensors"),
    ("matgptq_vllm/kernels/x.py", "from vllm.triton_utils import tl"),
    ("matgptq_vllm/kernels/x.py", "from matgptq_vllm.engine import precision_state"),
    ("matgptq_vllm/kernels/x.py", "from matgptq_vllm.kernels.bench import timing"),
    ("matgptq_vllm/kernels/x.py", "def f():\n    import matgptq_vllm.kernels.bench.peers"),
    ("matgptq_vllm/kernels/x.py", "from matgptq_vllm.kernels.tune import search"),
    ("matgptq_vllm/kernels/tables.py", "import torch"),
    ("matgptq_vllm/kernels/tune/x.py", "import vllm"),
    ("matgptq_vllm/kernels/tune/x.py", "import calibrate.option_fields"),
    ("matgptq_vllm/kernels/tune/options.py", "import torch"),
    ("matgptq_vllm/kernels/bench/x.py", "def f():\n    import vllm"),
    ("matgptq_vllm/kernels/bench/x.py", "import matplotlib"),
    ("matgptq_vllm/kernels/bench/x.py", "import triton"),
    ("matgptq_vllm/kernels/bench/peers.py", "from matgptq_vllm.kernels import ops"),
    ("matgptq_vllm/engine/x.py", "import vllm.config"),
    ("matgptq_vllm/engine/x.py", "from matgptq_vllm.kernels.ops import matmul"),
    ("matgptq_vllm/plugin/x.py", "import matgptq_vllm.kernels.reference"),
    ("matgptq_vllm/plugin/x.py", "import serve.cli"),
    ("matgptq_vllm/plugin/x.py", "import calibrate.model"),
    ("matgptq_vllm/compat/x.py", "from matgptq_vllm.plugin import linear"),
    ("matgptq_vllm/compat/x.py", "import matgptq_vllm.kernels.ops"),
    ("matgptq_vllm/__init__.py", "import torch"),
    ("matgptq_vllm/__init__.py", "from matgptq_vllm.core import errors"),
    ("matgptq_vllm/cli.py", "import torch"),
    ("matgptq_vllm/cli.py", "import calibrate.run"),
    ("matgptq_vllm/cli.py", "from matgptq_vllm.core.checkpoint import ParentReader"),
    ("calibrate/x.py", "import vllm"),
    ("calibrate/x.py", "def f():\n    import triton.language as tl"),
    ("calibrate/x.py", "from matgptq_vllm.kernels import reference"),
    ("calibrate/evaluate/x.py", "import serve.settings"),
    ("serve/x.py", "import torch"),
    ("serve/x.py", "import numpy"),
    ("serve/x.py", "import vllm"),
    ("serve/x.py", "from matgptq_vllm.core.checkpoint import ParentReader"),
    ("serve/x.py", "import matgptq_vllm.core"),
    ("serve/x.py", "import calibrate.cli"),
    ("serve/stat_logger.py", "import torch"),
    ("loadtests/x.py", "import matgptq_vllm.core.precision"),
    ("loadtests/x.py", "import serve.settings"),
    ("loadtests/x.py", "import vllm"),
    ("matgptq_vllm/novel.py", "import os"),
    ("matgptq_vllm/novel/__init__.py", ""),
    ("matgptq_vllm/kernels/novel/x.py", ""),
    ("calibrate/novel/x.py", ""),
    ("serve/novel/x.py", ""),
    ("novel/x.py", ""),
    ("utils/__init__.py", ""),
]

ALLOWED = [
    ("matgptq_vllm/core/x.py", "import torch.nn\nimport safetensors\nimport json\nfrom . import precision"),
    ("matgptq_vllm/core/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import vllm"),
    ("matgptq_vllm/core/x.py", "import typing\nif typing.TYPE_CHECKING:\n    from vllm.config import VllmConfig"),
    ("matgptq_vllm/core/replica.py", "from matgptq_vllm.core.profile import Profile\nfrom .errors import InputError"),
    ("matgptq_vllm/engine/x.py", "from matgptq_vllm.kernels import segments\nfrom matgptq_vllm.core.planes import PlaneLayout"),
    ("matgptq_vllm/plugin/x.py", "from matgptq_vllm.kernels import ops\nimport vllm.config"),
    ("matgptq_vllm/kernels/bench/x.py", "from matgptq_vllm.kernels import ops\nfrom matgptq_vllm.kernels.bench import peers"),
    ("matgptq_vllm/kernels/bench/peers.py", "def f():\n    from vllm import _custom_ops"),
    ("matgptq_vllm/kernels/tune/x.py", "from matgptq_vllm.kernels.bench import timing\nimport torch"),
    ("matgptq_vllm/cli.py", "from matgptq_vllm import __version__\nimport calibrate.cli\nimport serve.cli"),
    (
        "serve/x.py",
        "from matgptq_vllm.core import precision\nfrom matgptq_vllm.core.parent import QUANT_METHOD\nimport starlette",
    ),
    ("calibrate/column_kernel.py", "import triton.language as tl"),
    ("serve/cli.py", "def run():\n    from vllm.entrypoints.cli.main import main"),
    ("tests/x.py", "import vllm, calibrate.run"),
    (".hidden/x.py", "import vllm"),
]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A product with the modules that the planted imports name, all empty."""
    packages = ["", "core/", "kernels/", "kernels/bench/", "kernels/tune/", "engine/", "plugin/", "compat/"]
    named = ["core/errors", "core/precision", "core/profile", "kernels/ops", "kernels/segments", "kernels/reference"]
    named += ["kernels/bench/timing", "kernels/bench/peers", "kernels/tune/search"]
    for module in [f"{package}__init__" for package in packages] + named:
        path = tmp_path / "matgptq_vllm" / f"{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert violations(tmp_path) == []
    return tmp_path


def plant(tree: Path, path: str, source: str) -> None:
    file = tree / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source, encoding="utf-8")


@pytest.mark.parametrize(("path", "source"), FORBIDDEN)
def test_a_planted_violation_is_caught_where_it_stands(tree: Path, path: str, source: str) -> None:
    plant(tree, path, source)
    found = violations(tree)
    assert len(found) == 1
    assert found[0].startswith(f"{path}:")


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_what_the_table_allows_is_not_reported(tree: Path, path: str, source: str) -> None:
    plant(tree, path, source)
    assert violations(tree) == []


@pytest.mark.parametrize(("module", "absent"), STAYS_OUT)
def test_importing_a_light_module_loads_nothing_heavy(module: str, absent: tuple[str, ...], tmp_path: Path) -> None:
    code = f"import sys, {module}; print(*(name for name in {absent!r} if name in sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []
