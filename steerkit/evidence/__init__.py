"""What a reader sees: answers of every vector to questions that nothing was fitted on, scored without a judge.

`questions` are asked, of `behaviours` with system prompts in opposite pairs and of `subjects`, the vectors. `answering`
has the model answer and say what it thinks of answers, `measuring` does so part by part, `folder` keeps the parts.
`classifier` and `markers` find a behaviour in a text, `formulas` are the scores and the verdict, `scoring` puts them
together, `judged` lets a judge take over, and `summary` says what a folder says.
"""

from __future__ import annotations

from steerkit.evidence.answering import Bench, Row
from steerkit.evidence.behaviours import Behaviour, behaviours
from steerkit.evidence.folder import Folder, Part
from steerkit.evidence.judged import judge_all
from steerkit.evidence.measuring import Run, forecast, rows_of
from steerkit.evidence.subjects import Subject, behaviour_of, names_of, subject, usable
from steerkit.evidence.summary import summary, weights_facts, write_summary

__all__ = [
    "Behaviour",
    "Bench",
    "Folder",
    "Part",
    "Row",
    "Run",
    "Subject",
    "behaviour_of",
    "behaviours",
    "forecast",
    "judge_all",
    "names_of",
    "rows_of",
    "subject",
    "summary",
    "usable",
    "weights_facts",
    "write_summary",
]
