"""Who a photograph is of, which eye it shows and when it was taken; and how a patient's id becomes a pseudonym.

Results hold pseudonyms: HMAC-SHA256 of the id under a salt of the site. Ids are few and guessable, so whoever has the
salt can find them again, and whoever has not cannot. It is a secret that must lie apart from the results (GDPR,
article 4(5)): MA_CLUSTER_SALT holds the site's; where it is not set, a random one is drawn once, said to be, and kept
in the state folder of this user on this machine, never in a run's destination. Runs under one salt call a patient by
one name, runs under two do not. Where nothing can be kept, the salt lives as long as this process.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from pathlib import Path

from ma_cluster.errors import StoreError, UsageError
from ma_cluster.storage.store import open_store

log = logging.getLogger(__name__)
SALT_VARIABLE = "MA_CLUSTER_SALT"
_LEAST_SALT = 16  # characters: a shorter one can be found by trying
_LONGEST_VISIT = 32  # characters of a visit that is no date: a label, not a story
_EYES = {
    "": "",
    **dict.fromkeys(("r", "right", "od", "re"), "R"),
    **dict.fromkeys(("l", "left", "os", "le"), "L"),
}
_DATE = re.compile(r"(\d{4})-?(\d{2})-?(\d{2})(?:[T ].*)?")
_LIKE_A_DATE = re.compile(r"\d+(?:[./-]\d+){2}(?:[T ]\d.*)?")  # which comes first, the day or the month?
_ISO_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_PSEUDONYM = re.compile(r"[0-9a-f]{4}-[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Pseudonyms:
    """What patients are called in results: `of` an id, which is its HMAC behind four digits that tell the salt."""

    salt: bytes | None = field(repr=False)
    """None keeps the ids as they are."""

    def of(self, patient: str) -> str:
        """The name of a patient; "" of an empty id."""
        patient = patient.strip()
        if self.salt is None or not patient:
            return patient
        return f"{self.tag}-{self._keyed(f'patient {patient}')[:16]}"

    @property
    def tag(self) -> str:
        """What tells them from those of another salt: the four digits, or `ids` where ids are kept."""
        return "ids" if self.salt is None else self._keyed("salt")[:4]

    def _keyed(self, text: str) -> str:
        return hmac.new(self.salt or b"", text.encode(), hashlib.sha256).hexdigest()


def site_pseudonyms(keep_ids: bool = False) -> Pseudonyms:
    """Those of this site: of MA_CLUSTER_SALT, else of the salt that this user's state folder keeps.

    Raises:
        UsageError: MA_CLUSTER_SALT, or the salt that is kept, is too short to be a secret.
    """
    if keep_ids:
        return Pseudonyms(None)
    told = os.environ.get(SALT_VARIABLE, "")
    if 0 < len(told) < _LEAST_SALT:
        raise UsageError(f"{SALT_VARIABLE} is shorter than {_LEAST_SALT} characters; take a random one, and keep it")
    return Pseudonyms(told.encode() or _kept_salt())


def salts(patients: Iterable[str]) -> set[str]:
    """What tells the salts apart under which these pseudonyms were made; ids that were kept count as one more."""
    return {patient[:4] if _PSEUDONYM.fullmatch(patient) else "" for patient in patients}


def eye_named(text: str) -> str:
    """R or L, "" of nothing.

    Raises:
        UsageError: it is neither.
    """
    eye = _EYES.get(text.strip().casefold())
    if eye is None:
        raise UsageError("eye is R or L (or right, left, OD, OS), or left empty")
    return eye


def visit_named(text: str) -> str:
    """A date as YYYY-MM-DD (of that form, or YYYYMMDD, without its time), any other short label as it is.

    Raises:
        UsageError: it is too long, or a date that there is not, or that is written in another way.
    """
    text = text.strip()
    if (found := _DATE.fullmatch(text)) is not None:
        try:
            return date(*(int(part) for part in found.groups())).isoformat()
        except ValueError as error:
            raise UsageError("visit is no date of the calendar") from error
    if _LIKE_A_DATE.fullmatch(text):
        raise UsageError("visit looks like a date, but is not written as one: write YYYY-MM-DD")
    if len(text) > _LONGEST_VISIT or not text.isprintable():
        raise UsageError(f"visit is a date, YYYY-MM-DD, or a label of at most {_LONGEST_VISIT} characters")
    return text


def is_date(visit: str | None) -> bool:
    """Whether a visit, as `visit_named` writes it, is a date: labels have no order."""
    return visit is not None and _ISO_DATE.fullmatch(visit) is not None


def years_between(before: str, after: str) -> float:
    """The time from one visit to the other, both dates; years."""
    return (date.fromisoformat(after) - date.fromisoformat(before)).days / 365.25


@cache
def _kept_salt() -> bytes:
    drawn = secrets.token_hex(32).encode()
    state = open_store(Path("~/.local/state/ma_cluster").expanduser(), private=True)
    try:
        is_new = state.create("salt", drawn)  # the first one stays
        kept = state.get("salt")
    except StoreError:
        log.warning(
            "the salt of patients' pseudonyms cannot be kept in ~/.local/state/ma_cluster, and ends with this process: "
            "set %s, or a run that has pseudonyms cannot be gone on with",
            SALT_VARIABLE,
        )
        return drawn
    if is_new:
        log.warning(
            "a salt for patients' pseudonyms was drawn and is kept in ~/.local/state/ma_cluster/salt of this machine "
            "alone: set %s where others are to go on with its runs, as on a cluster",
            SALT_VARIABLE,
        )
    if len(kept) < _LEAST_SALT:
        raise UsageError(
            f"the salt that is kept, ~/.local/state/ma_cluster/salt, is shorter than {_LEAST_SALT} characters: put it "
            f"back from a copy, or set {SALT_VARIABLE}; without either delete it, and patients get new pseudonyms"
        )
    return kept
