"""Searches over mixture coefficients: ask for candidates, tell their scores. They know nothing of models."""

from t2.adapters.search.base import Candidate, Key, Search
from t2.adapters.search.cem import CEM

__all__ = ["CEM", "Candidate", "Key", "Search"]
