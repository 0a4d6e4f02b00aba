"""Answers graded by a language model.

`rubric` fills in what is to be rated, `endpoint` asks a model over HTTP and `local` one in this process, `scale` reads
the number out of the reply, `judging` finds a judge by its name and runs it.
"""

from __future__ import annotations

from steerkit.evaluate.judges.endpoint import EndpointJudge
from steerkit.evaluate.judges.judge import Judge
from steerkit.evaluate.judges.judging import check_judge, judge_of, rate
from steerkit.evaluate.judges.local import LocalJudge
from steerkit.evaluate.judges.scale import expected_score, parse_score

__all__ = ["EndpointJudge", "Judge", "LocalJudge", "check_judge", "expected_score", "judge_of", "parse_score", "rate"]
