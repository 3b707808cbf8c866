"""The build backend: setuptools, with editable installations that type checkers can
read.

For a layout like this one, setuptools makes an import hook. mypy and pyright run no
hooks: they read folders from ``.pth`` files. The wheel of an editable installation
therefore names the folder ``.editable/``, which contains only a link to the package.
The hook still finds modules that lie elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

ROOT = Path(__file__).resolve().parent
FOLDER, PACKAGE = ROOT / ".editable", "reweight_ops"


def build_editable(
    wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None
) -> str:
    name: str = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    FOLDER.mkdir(exist_ok=True)
    if not (FOLDER / PACKAGE).exists():
        (FOLDER / PACKAGE).symlink_to(Path("..") / PACKAGE, target_is_directory=True)
    add(Path(wheel_directory) / name, f"{PACKAGE}_typed.pth", f"{FOLDER}\n".encode())
    return name


def add(wheel: Path, name: str, content: bytes) -> None:
    """Add a file to a wheel and to the wheel's list of files."""
    with zipfile.ZipFile(wheel) as old:
        files = {entry: old.read(entry) for entry in old.namelist()}
    (record,) = (entry for entry in files if entry.endswith(".dist-info/RECORD"))
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
    files[record] += f"{name},sha256={digest},{len(content)}\n".encode()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as new:
        for entry, data in {name: content, **files}.items():
            new.writestr(entry, data)
