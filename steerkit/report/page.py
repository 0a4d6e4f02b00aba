"""One HTML page from a template, with pictures that hold their own data."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, NamedTuple

from steerkit.report.heat_cells import bounds_of

__all__ = ["PagePart", "embedded_picture", "json_text", "render_page"]


def render_page(template: str, **content: Any) -> str:
    """Fill a template that lies beside this file.

    Args:
        template: its name.
        content: what it shows.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(number=_number, bounds=bounds_of)
    return str(made.get_template(template).render(**content))


class PagePart(NamedTuple):
    """A picture with what it says."""

    picture: str
    words: str


def embedded_picture(svg: str, alt: str) -> Any:
    """Embed a picture as an image, so that its ids and styles do not mix with those of the page.

    Args:
        svg: the picture.
        alt: what it shows, in words.
    """
    from markupsafe import Markup, escape

    data = base64.b64encode(svg.encode()).decode()
    return Markup(f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(alt)}">')


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:g}"


def json_text(content: Any) -> str:
    """Plain data as indented JSON; empty for None.

    Args:
        content: what JSON can hold.
    """
    return "" if content is None else json.dumps(content, indent=2, ensure_ascii=False)
