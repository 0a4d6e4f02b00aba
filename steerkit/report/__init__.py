"""Everything that was measured of a vector, on one HTML page.

`gather` measures, `evidence` holds the results, `html` lays them out with the pictures of `plots`. `comparison` sets
methods side by side, `card` writes a vector's Markdown card, `heat_page` shows the tokens of texts.
"""

from __future__ import annotations

from steerkit.report.card import vector_card
from steerkit.report.comparison import comparison_html
from steerkit.report.evidence import Evidence
from steerkit.report.evidence_parts import EvidencePlan
from steerkit.report.html import report_html

__all__ = ["Evidence", "EvidencePlan", "comparison_html", "report_html", "vector_card"]
