"""The name of a checkpoint's model, by which clients ask for it."""

from __future__ import annotations

import json
import re
from pathlib import Path

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_NEMOTRON = re.compile(r"(?:nvidia/)?(?:nvidia-)?(nemotron-3-[\w.-]+?)(?:-(?:bf16|fp8|nvfp4))?", re.IGNORECASE)


def model_name(folder: Path) -> str:
    """The name of the model in a checkpoint folder.

    From the layout of the hub's cache (``models--org--name/snapshots/commit``), else ``_name_or_path`` in config.json
    if it is a hub name, else the folder's own. A Nemotron 3 release, which the hub names by format and in capitals, has
    the name that NVIDIA's API has for it: ``nvidia/nemotron-3-super-120b-a12b``.
    """
    name = _cached_name(folder) or _configured_name(folder) or folder.resolve().name
    nemotron = _NEMOTRON.fullmatch(name)
    return f"nvidia/{nemotron[1].lower()}" if nemotron else name


def _cached_name(folder: Path) -> str | None:
    for path in (folder.absolute(), folder.resolve()):  # the folder may be a link into the cache
        if path.parent.name == "snapshots" and (match := _CACHED.fullmatch(path.parent.parent.name)):
            return f"{match[1]}/{match[2]}"
    return None


def _configured_name(folder: Path) -> str | None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = config.get("_name_or_path")
    # What was saved from a folder has its path here, which tells nothing to a client.
    return name if isinstance(name, str) and _HUB_NAME.fullmatch(name) and not name.startswith(".") else None
