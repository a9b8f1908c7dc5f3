"""Recipes that earlier searches found, so that they can be run again.

FILE            a recipe as JSON: {"name": ..., "layers": ...}, or JSON that holds one as "recipe", such as
                flatout.json and what `flatout optimize --json` prints
FOLDER          an artifact: the recipe of its flatout.json
FILE:NAME       any candidate of that search by its name, e.g. artifact:joint-2
NAME            the same in the artifact at the output folder
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flatout.core.artifact import MANIFEST, is_artifact, recipe_from_json
from flatout.core.files import read_json_object, shown
from flatout.core.formats import Recipe
from flatout.errors import ConfigError


def saved_recipe(text: str, out: Path) -> Recipe | None:
    """The recipe that `text` names, None when it names no file and no candidate of the artifact at `out`.

    Raises ModelFileError for a file that holds none, ConfigError for a candidate that it does not hold.
    """
    path, _, name = text.partition(":")
    if path and Path(path).exists():
        return _recipe(Path(path), name)
    if is_artifact(out) and text in _candidates(read_json_object(out / MANIFEST)):
        return _recipe(out, text)
    return None


def _recipe(path: Path, name: str) -> Recipe:
    content = read_json_object(path / MANIFEST if path.is_dir() else path)
    if not name:
        return recipe_from_json(content.get("recipe", content))
    known = _candidates(content)
    if name not in known:
        raise ConfigError(
            f"a candidate of that search is one of {', '.join(known) or 'none'}",
            shown(name),
            shown(str(path)),
        )
    return recipe_from_json(known[name])


def _candidates(content: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> recipe, as JSON, of the candidates in flatout.json or in a result."""
    return dict(_named(content.get("measurements", content)))


def _named(result: Any) -> Iterator[tuple[str, Any]]:
    rows = result.get("candidates") if isinstance(result, dict) else None
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and isinstance(row.get("name"), str) and "recipe" in row:
            yield row["name"], row["recipe"]
