"""Relative imports in a file that is imported by its path: what to write instead."""

from __future__ import annotations

import ast


def advice(file: str, statement: ast.ImportFrom) -> str:
    """One sentence about a relative import in a file of that name."""
    what = f"{file} is a file of its own, not part of a package"
    if statement.level > 1:
        return (
            f"{what}: write the package's name instead of the dots, or name a task by its package, "
            "as `task: package.module:Class`"
        )
    names = ast.unparse(ast.Import(statement.names)).removeprefix("import ")
    way = f"from {statement.module} import" if statement.module else "import"
    return f"{what}: write `{way} {names}`"
