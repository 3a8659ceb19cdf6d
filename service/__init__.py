"""Quintet, as it is deployed. Imports none of the project's other packages, and never torch."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`service:Quintet`, for BentoML; found late, so that reading a room needs no server."""
    if name == "Quintet":
        from service.app import Quintet

        return Quintet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
