"""HTML pages that open offline: one style, one template for each kind of report, no script, nothing loaded."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

_TEMPLATES = Environment(
    loader=PackageLoader(str(__package__)),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def fragment(template: str, **values: Any) -> str:
    """A report with its style, for a notebook's cell.

    Args:
        template: ``conversion.html`` or ``costs.html``.
        values: what the template names; every one is escaped.
    """
    return _TEMPLATES.get_template(template).render(**values)


def page(template: str, title: str, **values: Any) -> str:
    """A whole document around the ``fragment``."""
    return _TEMPLATES.get_template("page.html").render(template=template, title=title, **values)
