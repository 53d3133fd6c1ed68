"""`python -m llama_fast.benchmarks.report`: writes docs/performance.md and its pictures from the files in benchmarks/results alone."""

from pathlib import Path

import typer

from llama_fast.benchmarks.report.publish import DOCS, RESULTS, read_results, write_report


def main(results: Path = RESULTS, out: Path = DOCS) -> None:
    """Writes the page from the files in RESULTS into OUT."""
    try:
        print(write_report(read_results(results), out))
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    typer.run(main)
