"""The form of a deletion record: an in-toto Statement v1 with a predicate of megu's own.

docs/schemas/deletion-record-v1.json is the JSON schema of these classes.
"""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

STATEMENT: Literal["https://in-toto.io/Statement/v1"] = "https://in-toto.io/Statement/v1"
PREDICATE: Literal["urn:megu:deletion-record:v1"] = "urn:megu:deletion-record:v1"
SCHEMA = "deletion-record-v1.json"

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Salted = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
# An id, not a name: it stands in the record as it is.
Identifier = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:#-]{0,99}$")]
Count = Annotated[int, Field(ge=0, strict=True)]
# JSON without texts that the user chose.
Figures = dict[str, Any]

LIMITS = (
    "It does not prove that the weights hold nothing of the forgotten images: the figures are measurements of some "
    "attacks, not a bound on all of them.",
    "It does not prove that other copies of the images, of the earlier model or of its backups were deleted.",
    "It does not prove that the list holds all images that the requester asked for.",
    "Dates and ids are what the signer stated; the signature tells who signed, not when.",
    "A second computation gives the same bytes only with the same versions, device and number of threads.",
)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Sha256(_Part):
    """A digest as in-toto writes it."""

    sha256: Digest


class Subject(_Part):
    """A file of the unlearned model."""

    name: str
    digest: Sha256


class Asked(_Part):
    """One request: what was sent, and when. Its items are salted, so that only who has the salt can look for one."""

    id: Identifier
    reference: Salted | None = Field(description="the requester's own reference, salted")
    received: date | None
    due: date | None
    done: date | None
    deletion_list: Digest | None = Field(description="sha256 of the deletion list as sent")
    named: Salted | None = Field(description="salted digest of the classes, people or draw, where no list was sent")
    items: list[Salted] = Field(description="salted digest of each line, class or person, in the order sent")

    @model_validator(mode="after")
    def _consistent(self) -> Asked:
        if (self.deletion_list is None) == (self.named is None):
            raise ValueError("a request has either a list or names")
        if self.received and self.done and self.done < self.received:
            raise ValueError("done lies before received")
        return self


class Forgotten(_Part):
    """The images that were forgotten, copies among them."""

    kind: Literal["classes", "subclasses", "samples", "subjects", "random"]
    images: Count
    copies: Count = Field(description="how many of them are byte copies that were added to the request")
    of: Literal["files", "pixels"] | None = Field(description="what the digests are made of; null: none were stored")
    image_digests: list[Salted]
    copy_digests: list[Salted]
    lookalikes: list[Digest] = Field(description="perceptual hashes of 256 bits; empty unless they were asked for")

    @model_validator(mode="after")
    def _consistent(self) -> Forgotten:
        if self.of and (len(self.image_digests), len(self.copy_digests)) != (self.images, self.copies):
            raise ValueError("the number of digests is not the number of images")
        if self.copies > self.images:
            raise ValueError("there are more copies than images")
        return self


class Parent(_Part):
    """The model that was unlearned."""

    files: dict[str, Digest] = Field(description="sha256 of its files; their own names are not told")
    weights: str = Field(description="digest of its tensors, as the unlearned model names its parent")


class Salt(_Part):
    """How items and images are salted."""

    algorithm: Literal["HMAC-SHA256, first 16 bytes"]
    check: Digest = Field(description="sha256 that tells whether a salt is the right one")


class Versions(_Part):
    """The software that made the model."""

    megu: str
    torch: str


class Predicate(_Part):
    """What was asked, what was forgotten, from which model, how, and with which result."""

    requests: Annotated[list[Asked], Field(min_length=1)]
    forgotten: Forgotten
    salt: Salt
    parent: Parent
    files: dict[str, Digest] = Field(description="every file that the run wrote, relative to the run directory")
    settings: dict[str, Figures] = Field(description="settings of each stage that decide its result")
    versions: Versions
    figures: Figures | None = Field(description="from eval.json; null: not measured")
    does_not_prove: list[str]

    @model_validator(mode="after")
    def _told(self) -> Predicate:
        if tuple(self.does_not_prove) != LIMITS:
            raise ValueError("does_not_prove is not the text of this version")
        return self


class Statement(_Part):
    """The in-toto Statement."""

    type_: Literal["https://in-toto.io/Statement/v1"] = Field(STATEMENT, alias="_type")
    subject: Annotated[list[Subject], Field(min_length=1)]
    predicate_type: Literal["urn:megu:deletion-record:v1"] = Field(PREDICATE, alias="predicateType")
    predicate: Predicate

    @model_validator(mode="after")
    def _consistent(self) -> Statement:
        for subject in self.subject:
            if self.predicate.files.get(subject.name) != subject.digest.sha256:
                raise ValueError(f"subject {subject.name} and files give different digests")
        return self

    @property
    def plain(self) -> dict[str, Any]:
        """As JSON data."""
        return self.model_dump(mode="json", by_alias=True)


def schema() -> dict[str, Any]:
    """The JSON schema of a statement."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": PREDICATE,
        **Statement.model_json_schema(by_alias=True),
    }
