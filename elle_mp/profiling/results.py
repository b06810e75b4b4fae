"""Files of results: written whole, read with care."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from elle_mp.data.files import file_errors, write_whole
from elle_mp.errors import UserError
from elle_mp.observe.metrics import write_json

KERNELS, STEP = "elle-mp profile kernels", "elle-mp profile step"


def write_results(
    results: Mapping[str, Any],
    json_file: Path | None,
    html_file: Path | None,
    page: Callable[[Mapping[str, Any]], str],
) -> None:
    """Writes the numbers, and the page made of them, where a file is given.

    Raises:
        UserError: a file cannot be written.
    """
    if json_file is not None:
        write_json(json_file, results)
    if html_file is not None:
        write_whole(html_file, page(results).encode())


def read_results(path: Path) -> dict[str, Any]:
    """What :func:`write_results` wrote.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    with file_errors("read", path):
        content = path.read_bytes()
    try:
        results = json.loads(content)
    except ValueError:
        raise UserError(f"{path}: not JSON; give a file that 'elle-mp profile ... --json' wrote") from None
    if not isinstance(results, dict) or results.get("kind") not in (KERNELS, STEP):
        raise UserError(f"{path}: not a file that 'elle-mp profile ... --json' wrote")
    if not isinstance(results.get("machine"), dict) or not isinstance(results.get("rows"), list) or not results["rows"]:
        raise UserError(f"{path}: the results are broken: it has no machine or no rows")
    return results
