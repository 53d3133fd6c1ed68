"""The performance page and its pictures, from result files alone.

The same files give the same page, byte for byte, and the same pictures with the same release of matplotlib.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from llama_fast.benchmarks.report.html import html_page
from llama_fast.benchmarks.report.measured import File, by_device, read_file
from llama_fast.benchmarks.report.page import FOLDER, PAGE, WorkKey, page, page_of_one_run
from llama_fast.benchmarks.report.plots import Picture, draw, is_ours
from llama_fast.benchmarks.suite.campaign import LOG, PACKED
from llama_fast.benchmarks.suite.record import Record, machine_folder
from llama_fast.benchmarks.suite.run import KINDS, find_cases, work_key

_HERE = Path(__file__).resolve().parents[1]  # of the checkout, also when it is imported through the link
RESULTS = _HERE / "results"
DOCS = _HERE.parent / "docs"


def read_results(folder: Path) -> dict[str, File]:
    """All files under a folder, by their paths in it. None is passed over but a campaign's log and archive.

    Raises:
        ValueError: a file is no record, profile, sweep or run of the tests, or is in another machine's folder.
    """
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.name in (LOG, PACKED):
            continue
        file = read_file(path)
        right = folder / machine_folder(file.machine)
        if path.parent != right:
            raise ValueError(f"{path} was measured on another machine than its folder says: it belongs in {right}")
        files[path.relative_to(folder).as_posix()] = file
    return files


def suite_cases() -> dict[str, list[WorkKey]]:
    """Every piece of work that the suite has for a device of type "cuda" and for "cpu"."""
    return {
        kind: [work_key(case) for case in find_cases(KINDS, None, torch.device(kind), quick=False)]
        for kind in ("cuda", "cpu")
    }


def write_report(files: Mapping[str, File], folder: Path) -> Path:
    """Writes the page of files, by name, and its pictures into a folder that is made if need be; returns the page's path.

    Pictures of a page that was there before are removed, but no others.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: two of them have results of the same work.
    """
    return _write(folder, *page(by_device(files), suite_cases()))


def write_report_of_one_run(record: Record, folder: Path) -> tuple[Path, Path]:
    """Writes the page of one measurement and its pictures as `write_report` does, and one HTML file with all of it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    (device,) = by_device({"this run": record})
    markdown = _write(folder, *page_of_one_run(device))
    html = markdown.with_suffix(".html")
    html.write_text(html_page(markdown), encoding="utf-8")
    return markdown, html


def _write(folder: Path, text: str, pictures: Sequence[Picture]) -> Path:
    shown = {folder / FOLDER / picture.file: picture for picture in pictures}
    for old in (folder / FOLDER).rglob("*.svg"):
        if old not in shown and is_ours(old.read_text(encoding="utf-8")):
            old.unlink()
    for path, picture in shown.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(picture, path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PAGE).write_text(text, encoding="utf-8")
    return folder / PAGE
