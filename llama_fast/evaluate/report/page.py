"""An evaluation as one HTML page that needs nothing else."""

from ...reports import units
from ...reports.pages import templates
from ..result import Evaluation
from . import view


def page(evaluation: Evaluation) -> str:
    """The page's HTML. Whatever comes from outside (prompts, outputs, names) is escaped."""
    environment = templates("llama_fast.evaluate.report")
    environment.globals |= {"view": view}
    environment.filters |= {"duration": units.duration}
    return environment.get_template("page.html.jinja").render(evaluation=evaluation, title=view.title(evaluation))
