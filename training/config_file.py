"""Training configurations as YAML files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from t2.core.errors import ArgumentError, nearest
from t2.training.config import TrainConfig


@dataclass(frozen=True)
class ConfigFile:
    """What a configuration file says.

    Attributes:
        path: the file.
        values: by field of :class:`t2.training.config.TrainConfig`.
        lines: the line of each, from 1.
    """

    path: Path
    values: dict[str, Any]
    lines: dict[str, int]

    def where(self, overridden: Mapping[str, Any]) -> Callable[[str], str]:
        """For errors: the place of a field's value, unless another one was given for it elsewhere."""

        def place(field: str) -> str:
            line = self.lines.get(field)
            return "" if line is None or field in overridden else f"{self.path}, line {line}: "

        return place


def read_config_file(path: Path) -> ConfigFile:
    """Read a configuration file: a YAML mapping from fields to values.

    Raises:
        ArgumentError: it cannot be read, is not such a mapping, or has an unknown field or one twice; with file, line
            and, for an unknown field, the nearest one.
    """
    loader: yaml.SafeLoader | None = None
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is None:
            return ConfigFile(path, {}, {})
        if not isinstance(root, yaml.MappingNode):
            raise ArgumentError(f"{path} is not a mapping of training options; write lines such as `task: t2_arc_easy`")
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in root.value:
            line = key_node.start_mark.line + 1
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key not in TrainConfig.model_fields:
                raise ArgumentError(
                    f"{path}, line {line}: {key} is not a training option{nearest(str(key), TrainConfig.model_fields)}"
                )
            if key in values:
                raise ArgumentError(f"{path}, line {line}: {key} stands on line {lines[key]} already; keep one of them")
            try:
                values[key] = loader.construct_object(value_node, deep=True)
            except ValueError as error:  # a date such as 2026-13-01
                raise ArgumentError(f"{path}, line {line}: {key} has a value that YAML cannot read: {error}") from error
            lines[key] = line
    except OSError as error:
        raise ArgumentError(f"cannot read the configuration {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path} is not UTF-8 text") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise ArgumentError(f"{path}{line} is not YAML: {error.problem or error.context}") from error
    except RecursionError as error:
        raise ArgumentError(f"{path} is nested too deeply for a training configuration") from error
    except yaml.YAMLError as error:
        raise ArgumentError(f"{path} is not YAML: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()
    return ConfigFile(path, values, lines)


def to_yaml(config: TrainConfig) -> str:
    """A configuration as the text of such a file, all its fields in their order."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text
