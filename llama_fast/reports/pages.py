"""HTML pages that need nothing else: no network, no script, light and dark."""

import jinja2


def templates(*packages: str) -> jinja2.Environment:
    """The templates of these packages, and what all pages share: `base.html.jinja` and its style. Whatever is filled in is escaped."""
    loaders = [jinja2.PackageLoader(package, ".") for package in (*packages, "llama_fast.reports")]
    return jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )  # fmt: skip
