"""What an expert says of itself: the manifest inside its file."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from t2.core.digests import DOC_HASH_BYTES, canonical_json

Hex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Label = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Kind = Literal["expert", "classifier", "mixture"]


NO_FINGERPRINT = "0" * 64
"""Fingerprint of every model that has nothing to adapt."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseModelRef(_Frozen):
    """The model whose matrices an expert scales.

    Attributes:
        id: the name it was loaded by, for people.
        revision: its revision, when it has one.
        fingerprint: digest of the contents of its adapted matrices, by which an expert is matched to a model.
    """

    id: Label
    revision: str | None = None
    fingerprint: Hex


class Parent(_Frozen):
    """One ingredient of a mixture: the digest of an expert and its coefficient."""

    digest: Hex
    alpha: float


class Manifest(_Frozen):
    """The manifest of an expert.

    Attributes:
        kind: ``expert`` answers, ``classifier`` names a prompt's domain, ``mixture`` was found by adaptation.
        base: the base model.
        targets: rank r of each adapted matrix, by parameter name.
        method: how it was made, for example ``reinforce`` or ``expected-reward``.
        training: the training configuration, as JSON.
        training_docs: hashes of the documents it was trained on, packed by :func:`pack_hashes`.
        parents: for a mixture, what was mixed.
        labels: for a classifier, the domains that it tells apart, as the model is to name them.
    """

    schema_version: Literal[1] = 1
    kind: Kind = "expert"
    name: Label
    base: BaseModelRef
    targets: dict[Label, Annotated[int, Field(ge=1)]]
    task: str | None = None
    domain: str | None = None
    method: str | None = None
    training: dict[str, Any] = Field(default_factory=dict)
    training_docs: str = ""
    parents: tuple[Parent, ...] = ()
    labels: tuple[Label, ...] = ()

    def canonical(self) -> str:
        """The canonical JSON text that is stored in the expert's file; equal manifests give equal text.

        Without labels the text does not name them, as it did before they existed: files keep their digests.
        """
        return canonical_json(self.model_dump(mode="json", exclude=None if self.labels else {"labels"}))


def pack_hashes(hashes: Iterable[str]) -> str:
    """Pack document hashes (:func:`t2.core.digests.doc_hash`) into one base64 text, sorted and without repeats."""
    return base64.b64encode(b"".join(bytes.fromhex(value) for value in sorted(set(hashes)))).decode()


def unpack_hashes(packed: str) -> list[str]:
    """The document hashes that :func:`pack_hashes` packed.

    Raises:
        ValueError: the text is not such a pack.
    """
    raw = base64.b64decode(packed, validate=True)
    if len(raw) % DOC_HASH_BYTES:
        raise ValueError(f"{len(raw)} bytes are no whole number of {DOC_HASH_BYTES}-byte hashes")
    return [raw[i : i + DOC_HASH_BYTES].hex() for i in range(0, len(raw), DOC_HASH_BYTES)]
