"""Engines run the adapted model: one protocol, one file per backend."""

from t2.adapters.engine.base import Engine, Generated, GenerateRequest, Scored, ScoreRequest

__all__ = ["Engine", "GenerateRequest", "Generated", "ScoreRequest", "Scored"]
