"""The uniform record every data set becomes."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Record:
    """One supervised example: a prompt, the images it speaks of, and the report to write.

    Attributes:
        id: unique within its data set; error messages name it.
        prompt: the user's turn, without chat template and without image placeholders.
        report: the text to generate.
        images: file paths or `PIL.Image.Image` objects, in the order the prompt shows them.
        meta: anything else worth keeping (split, patient, whether the text occurs in training, ...).
    """

    id: str
    prompt: str
    report: str
    images: tuple = ()
    meta: Mapping = field(default_factory=dict)

    @property
    def patient(self) -> str | None:
        """meta["patient_id"] as a text; None where there is none, or a table's cell was left blank."""
        value = self.meta.get("patient_id")
        text = "" if value is None or value != value else str(value).strip()
        return text or None
