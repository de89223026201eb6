"""Makes lm-eval know the model ``t2`` and the ``t2_*`` tasks when it is imported.

lm-eval 0.4.13 has no way to announce either from outside. An installed t2 therefore ships a ``.pth`` file whose one
line waits, in every program of the environment, for ``lm_eval`` to be imported, and then calls :func:`install`. The two
halves each do nothing where lm-eval does the same by itself: the model is left alone when the name is taken (newer
lm-eval reads the ``lm_eval.models`` entry point), the tasks when their folder is already among those indexed. With
``--model t2`` a task that does not exist is told in one line with the nearest name, where lm-eval has a traceback.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from importlib.machinery import ModuleSpec
    from pathlib import Path
    from types import ModuleType
    from typing import Any

MODEL_NAME = "t2"
MODEL_TARGET = "t2.harness.model:T2LM"


def tasks_folder() -> Path:
    """The folder of t2's task definitions."""
    from pathlib import Path

    return Path(__file__).resolve().parent.parent / "tasks_yaml"


def install() -> None:
    """Register model and tasks with lm-eval: now where it is imported, else when it will be. Safe to call again."""
    from t2.harness import excepthook

    if excepthook.runs_t2(sys.argv):
        excepthook.install(whole_program=True)
    if not any(type(finder) is _Finder for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in _ADJUSTMENTS:
        if name in sys.modules:
            _adjust(sys.modules[name])


def _register_model(module: ModuleType) -> None:
    from lm_eval.api.registry import model_registry

    if MODEL_NAME not in model_registry:
        model_registry.register(MODEL_NAME, target=MODEL_TARGET)


def _index_tasks(module: ModuleType) -> None:
    index = module.TaskIndex
    original = index.build
    if getattr(original, "_t2", False):
        return

    def build(paths: Iterable[Path], **kwargs: Any) -> Any:
        from pathlib import Path

        paths = [Path(path) for path in paths]
        resolved = {path.resolve() for path in paths}
        ours = tasks_folder()
        # Beside lm-eval's own tasks only: TaskManager(include_defaults=False) asks for nothing but the given folders.
        # In front of them, since a later folder wins when two define the same name.
        if Path(module.__file__ or "").parent.resolve() in resolved and ours not in resolved and ours.is_dir():
            paths.insert(0, ours)
        return original(paths, **kwargs)

    build._t2 = True  # type: ignore[attr-defined]
    index.build = staticmethod(build)


def _name_missing_tasks(module: ModuleType) -> None:
    from functools import wraps

    config = module.EvaluatorConfig
    original = config.process_tasks
    if getattr(original, "_t2", False):
        return

    @wraps(original)
    def process_tasks(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except ValueError as error:
            told, _, names = str(error).partition(": ")
            if self.model != MODEL_NAME or told != "Tasks not found":
                raise
            from lm_eval.tasks import TaskManager

            from t2.core.errors import TaskError, nearest
            from t2.harness.excepthook import install as one_line_errors

            one_line_errors()
            known = TaskManager(include_path=self.include_path).all_tasks
            first = names.split(", ")[0]
            raise TaskError(f"--tasks: {first} does not exist{nearest(first, known)}") from error

    process_tasks._t2 = True  # type: ignore[attr-defined]
    config.process_tasks = process_tasks


def _require_extra(module_name: str) -> None:
    from importlib.util import find_spec

    missing = [name for name in ("torch", "transformers", "accelerate") if find_spec(name) is None]
    if missing:
        from t2.core.errors import DependencyError
        from t2.harness.excepthook import install as one_line_errors

        one_line_errors()
        raise DependencyError(
            f"--model t2 needs {', '.join(missing)}, not part of the base install; run: pip install 't2-eval[eval]'"
        )


_ADJUSTMENTS: dict[str, Callable[[ModuleType], None]] = {
    # Not lm_eval.api.registry: a registry that is not empty no longer loads lm-eval's own models.
    "lm_eval.models": _register_model,
    "lm_eval.tasks._index": _index_tasks,
    "lm_eval.config.evaluate_config": _name_missing_tasks,
}
_REQUIREMENTS: dict[str, Callable[[str], None]] = {"t2.harness.model": _require_extra}


def _adjust(module: ModuleType) -> None:
    try:
        _ADJUSTMENTS[module.__name__](module)
    except Exception as error:  # noqa: BLE001 - a foreign version of lm-eval must go on working without t2
        import logging

        logging.getLogger("t2").warning(
            "t2 could not announce itself in %s (%s: %s); use a version of lm-eval that t2-eval's requirements allow",
            module.__name__,
            type(error).__name__,
            error,
        )


class _Finder:
    """Stands first on ``sys.meta_path``, lets the finders behind it find the modules named above, and adjusts them."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in _REQUIREMENTS:
            _REQUIREMENTS[name](name)
        if name not in _ADJUSTMENTS:
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """Another loader, and the adjustment after the module has run; then the module bears the other loader only."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._inner
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        self._inner.exec_module(module)
        _adjust(module)
