"""t2 from Python: load a model, adapt it, ask it, read what was done, keep it; train experts.

Everything that may be imported from here is in ``__all__``, and documented in ``docs/api.md``.
"""

from t2.adapters.expert import Expert
from t2.api.adapted import Adapted
from t2.api.model import Model, load_model
from t2.api.records import read_records
from t2.api.saved import SavedExpert, mix
from t2.core.errors import T2Error
from t2.core.record import AdaptationRecord
from t2.harness.examples import ChoiceExample, Example
from t2.training.api import TrainResult, train
from t2.training.config import TrainConfig, make_config

__all__ = [
    "AdaptationRecord",
    "Adapted",
    "ChoiceExample",
    "Example",
    "Expert",
    "Model",
    "SavedExpert",
    "T2Error",
    "TrainConfig",
    "TrainResult",
    "load_model",
    "make_config",
    "mix",
    "read_records",
    "train",
]
