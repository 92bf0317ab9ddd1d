"""HTML pages with plots: plotly inside, and a policy in the page that lets no other script run and nothing load."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from pipelines.pages import content_hash

HERE = Path(__file__).parent


def render_plots(template: Path, figures: Sequence[str], **values: Any) -> str:
    """The page that `template` makes of `values`; it finds plot_page.css, and gets `plotly` and `script_hashes`.

    figures: HTML of all plots on the page, whose scripts may run.
    """
    # what stands in their script elements; their data have no `<`
    scripts = re.findall("<script[^>]*>(.*?)</script>", "".join(figures), re.DOTALL)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, HERE]), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    hashes = [content_hash(script) for script in (get_plotlyjs(), *scripts)]
    return environment.get_template(template.name).render(plotly=Markup(get_plotlyjs()), script_hashes=hashes, **values)
