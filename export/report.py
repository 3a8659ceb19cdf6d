"""What the repository holds, model by precision: `python -m export --report`."""

from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from export.errors import ExportRefused
from export.publish import VARIANTS
from service.errors import NotFound
from service.models import MODELS
from service.repository import Repository, RepositoryError

COLUMNS: Final = (
    "model",
    "precision",
    "bytes",
    "largest difference",
    "same decisions",
    "score",
    "drop",
    "on CUDA",
    "items/s on a CPU",
)

NARROWEST: Final = 128


def report(folder: Path) -> None:
    """Show the highest version of every model, each file verified against its card.

    Raises:
        ExportRefused: there is no repository, or a file is not its card's.
    """
    table = Table(*COLUMNS, title=f"{folder}, every file verified against its card", title_justify="left")
    shipped = 0
    try:
        repository = Repository(folder)
        for model in MODELS:
            if model not in repository.models() or not repository.versions(model):
                table.add_row(model, "none yet", *([""] * (len(COLUMNS) - 2)))
                continue
            card = repository.open(model).card
            for variant in VARIANTS:
                if variant in card["files"]:
                    repository.open(model, None, (variant,))
                    shipped += card["files"][variant]["bytes"]
                    table.add_row(f"{model} {card['version']}", *_row(card, variant))
                else:
                    table.add_row(f"{model} {card['version']}", variant, "not shipped", *([""] * 6))
            table.add_section()
    except (RepositoryError, NotFound) as error:
        raise ExportRefused(str(error)) from error
    # A pipe has no width; the table has one.
    console = Console(width=max(Console().width, NARROWEST))
    console.print(table)
    console.print(
        f"{shipped:,} bytes in all; * marks what `auto` takes on a CPU like the one it was measured on."
    )


def _row(card: dict[str, Any], variant: str) -> list[str]:
    """One file's line."""
    export = card["export"]
    # Cards written before there were several precisions say the same of their only file one level up.
    facts = export.get("variants", {}).get(variant, export)
    placement = export.get("gpu_placement", {}).get(variant)
    cpu = export.get("cpu", {})
    speed = cpu.get("best", {}).get(variant)
    name, score = next(iter(card["scores"][variant].items()))
    drop = facts.get("score_differences", {}).get(name)
    return [
        variant,
        f"{card['files'][variant]['bytes']:,}",
        f"{facts['largest_difference']:.1e}",
        f"{facts['same_decisions']:.2%}" if "same_decisions" in facts else "",
        f"{name} {score:.4f}",
        "" if drop is None else f"{0.0 - drop:+.4f}",
        f"{placement['on_cuda']} of {placement['nodes']}" if placement else "",
        f"{speed['items_per_second']:,}{' *' if cpu.get('fastest') == variant else ''}" if speed else "",
    ]
