"""The three files of a report, each whole or as it was."""

from pathlib import Path

from ...reports.jsonfile import write_json, write_whole
from .markdown import markdown
from .page import page
from .record import Report


def write_report(report: Report, folder: Path) -> None:
    """Writes report.json, report.md and report.html.

    Raises:
        OSError: the disk is full.
    """
    write_json(folder / "report.json", report)
    write_whole(folder / "report.md", markdown(report))
    write_whole(folder / "report.html", page(report))
