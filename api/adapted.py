"""A model as a strategy has adapted it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2.adapters.convert.merge import check_free, write_merged
from t2.adapters.expert import Expert
from t2.adapters.strategies import Choice
from t2.api.answers import Asked
from t2.api.saved import SavedExpert, place, write_mixture
from t2.core.errors import ArgumentError
from t2.core.record import AdaptationRecord
from t2.harness import store

if TYPE_CHECKING:
    from t2.api.model import Model


class Adapted(Asked):
    """A base model under the mixture that a strategy has found, or under one for each of some prompts.

    Made by :meth:`t2.api.Model.adapt`. The base model itself stays as it is: a mixture is in its weights only while it
    answers.

    Args:
        model: the base model.
        record: what was done.
        experts: the experts that took part, controls applied.
        mixtures: the mixture of each prompt; one under None answers every prompt.
        marks: of the docs that it was found on, by which an expert made of it knows them again.
    """

    def __init__(
        self,
        model: Model,
        record: AdaptationRecord,
        experts: Sequence[Expert],
        mixtures: dict[str | None, Choice],
        marks: frozenset[str] = frozenset(),
    ) -> None:
        self.model = model
        self.record = record
        self.experts = tuple(experts)
        self._mixtures = mixtures
        self._marks = marks

    def __repr__(self) -> str:
        return f"<Adapted {self.model.base.id} by {self.record.strategy}: {self.record.note}>"

    def alpha(self, prompt: str | None = None) -> dict[str, float]:
        """The coefficients by expert, empty for the base; as in the record.

        Args:
            prompt: whose mixture is meant, where prompts have their own.

        Raises:
            ArgumentError: prompts have their own mixtures, and this is none of them.
        """
        return dict(self._choice(prompt).alpha)

    def save(
        self,
        name: str,
        *,
        prompt: str | None = None,
        domain: str | None = None,
        folder: str | Path | None = None,
        overwrite: bool = False,
    ) -> SavedExpert:
        """Write the mixture as an expert of kind ``mixture``, with its parents and their α.

        Args:
            name: the mixture's name.
            prompt: whose mixture, where prompts have their own.
            domain: what it is for.
            folder: where experts lie; None is ``T2_EXPERTS_DIR``.
            overwrite: replace an expert of that name.

        Raises:
            ArgumentError: the name is taken, or the base model answers, so that there is no mixture.
            StorageError: the file cannot be written.
        """
        choice = self._choice(prompt)
        if choice.z is None:
            raise ArgumentError(f"the base model stayed ({self.record.note}), so there is no mixture to save")
        path = place(name, folder, overwrite)
        return write_mixture(
            path,
            name,
            self.model.base,
            self.experts,
            choice.alpha,
            choice.z,
            method=self.record.strategy,
            training={"record": self.record.digest(), "control": self.record.control, "settings": self.record.settings},
            domain=domain,
            task=self.record.task,
            docs=self._marks,
        )

    def merge(self, folder: str | Path, *, prompt: str | None = None, overwrite: bool = False) -> Path:
        """Write base and mixture as an ordinary Hugging Face checkpoint, and return its folder.

        Args:
            folder: a new or empty folder.
            prompt: whose mixture, where prompts have their own.
            overwrite: replace a checkpoint that is there.

        Raises:
            ArgumentError: the folder is taken.
            ModelError: the model cannot be saved, since it is quantised.
            StorageError: the folder cannot be written.
        """
        choice = self._choice(prompt)
        path = Path(folder).expanduser().absolute()
        check_free(path, overwrite)
        origin = {
            "base": self.model.base.model_dump(mode="json"),
            "experts": [ref.model_dump(mode="json") for ref in self.record.experts],
            "alpha": choice.alpha,
            "strategy": self.record.strategy,
            "control": self.record.control,
            "settings": self.record.settings,
        }
        lm: Any = self.model.lm
        write_merged(self.model.engine, lm.own_tokenizer(), choice.z, path, origin, overwrite, lm.own_folder())
        return path

    def _asks(self) -> Model:
        return self.model

    def write_record(self, path: str | Path) -> None:
        """Write the record as ``record=`` of ``lm_eval --model t2`` does: a JSON list.

        Raises:
            StorageError: the file cannot be written.
        """
        store.write_records(Path(path).expanduser(), [self.record])

    def _choice(self, prompt: str | None) -> Choice:
        if None in self._mixtures:
            return self._mixtures[None]
        if prompt is None:
            raise ArgumentError(f"{len(self._mixtures)} prompts have mixtures of their own; say which prompt is meant")
        if prompt not in self._mixtures:
            raise ArgumentError(f"the prompt {prompt[:60]!r} was not dispatched; adapt to it with prompts= first")
        return self._mixtures[prompt]
