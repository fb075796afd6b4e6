"""The terminal: where the command prints its output and its errors."""

from __future__ import annotations

from rich.console import Console

console = Console()
errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
