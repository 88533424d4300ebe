"""Audits of models at recorded levels of access.

`AuditTarget.open(model, grant)` gives an auditor what was granted and writes down every use; an `AuditQuestion` is asked with
all techniques that a grant permits; `geobased audit run` leaves a signed report. `geobased.auditing.technique` tells how a
technique is written. Ledgers and reports need the extra `audit`.
"""

from .access import (
    BLACK,
    DE_FACTO_WHITE,
    GREY,
    OUTSIDE,
    WHITE,
    AccessDeniedError,
    AuditError,
    BudgetExhaustedError,
    Capability,
    access_name,
    parse_access,
)
from .endpoint import Endpoint
from .held_target import Forward, Intervention
from .image_target import ImageTarget
from .model_loading import ModelSource
from .questions import AuditQuestion, Item
from .target import CLAIMS, AuditTarget
from .technique import Progress, Technique, derived_seed, smallest_perturbation
from .text_target import TextTarget

__all__ = [
    "BLACK",
    "CLAIMS",
    "DE_FACTO_WHITE",
    "GREY",
    "OUTSIDE",
    "WHITE",
    "AccessDeniedError",
    "AuditError",
    "AuditQuestion",
    "AuditTarget",
    "BudgetExhaustedError",
    "Capability",
    "Endpoint",
    "Forward",
    "ImageTarget",
    "Intervention",
    "Item",
    "ModelSource",
    "Progress",
    "Technique",
    "TextTarget",
    "access_name",
    "derived_seed",
    "parse_access",
    "smallest_perturbation",
]
