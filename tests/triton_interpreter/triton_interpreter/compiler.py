"""The compiler half that Triton asks a backend for; the interpreter never calls it to compile."""

from typing import Any

from triton.backends.compiler import BaseBackend


class InterpreterBackend(BaseBackend):
    """Claims the target "cpu" and refuses to compile for it."""

    @staticmethod
    def supports_target(target: Any) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "interpreter"

    def parse_options(self, options: Any) -> Any:
        raise RuntimeError("this Triton backend only interprets; set TRITON_INTERPRET=1")

    def add_stages(self, stages: Any, options: Any, language: Any = None) -> None:
        raise RuntimeError("this Triton backend only interprets; set TRITON_INTERPRET=1")

    def load_dialects(self, context: Any) -> None:
        pass

    def get_module_map(self) -> dict[str, Any]:
        return {}


# Which abstract methods there are differs between Triton releases; none of the others is reached by the interpreter.
InterpreterBackend.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
