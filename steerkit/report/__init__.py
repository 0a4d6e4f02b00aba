"""Evidence on a page: `evidence` is what is shown, `gather` measures it, `html` lays it out, `card` writes the vector's
Markdown card, `heat_page` shows tokens, `plots` draws.
"""

from __future__ import annotations

from steerkit.report.card import vector_card
from steerkit.report.comparison import comparison_html
from steerkit.report.evidence import Evidence
from steerkit.report.evidence_parts import EvidencePlan
from steerkit.report.html import report_html

__all__ = ["Evidence", "EvidencePlan", "comparison_html", "report_html", "vector_card"]
