"""Grading answers by a language model: `scale` reads its number, `endpoint` asks one over HTTP, `local` one in this
process, `judging` chooses and runs it.
"""

from __future__ import annotations

from steerkit.evaluate.judges.endpoint import EndpointJudge
from steerkit.evaluate.judges.judge import Judge
from steerkit.evaluate.judges.judging import check_judge, judge_of, rate
from steerkit.evaluate.judges.local import LocalJudge
from steerkit.evaluate.judges.scale import expected_score, parse_score

__all__ = ["EndpointJudge", "Judge", "LocalJudge", "check_judge", "expected_score", "judge_of", "parse_score", "rate"]
