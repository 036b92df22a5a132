"""The contract of a model: everything that must be equal at training and at use, kept beside the weights in `sgpt.json`."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sgpt.errors import InputError
from sgpt.markers import MarkersConfig
from sgpt.pooling import POOLINGS

FILE = "sgpt.json"
FORMAT = 1


@dataclass
class Contract:
    """How texts become embeddings with these weights.

    base: path or hub id of the frozen trunk. normalize: embeddings are of length 1. prompts: by role, what stands before
    every text and is tokenised with it, as some sentence-transformers models were trained. probes: texts and their embeddings by
    role, as the weights gave them when they were saved; whoever loads the model can check that it still does.
    """

    pooling: str = "weighted_mean"
    markers: MarkersConfig = field(default_factory=MarkersConfig)
    normalize: bool = False
    base: str = ""
    probes: dict[str, list] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise InputError(f"pooling {self.pooling!r} is unknown; choose one of {', '.join(POOLINGS)}")

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Contract":
        file = folder / FILE
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            if stored.pop("format") != FORMAT:
                raise InputError(f"{file}: made by another version of this framework; export the run again")
            return cls(**{**stored, "markers": MarkersConfig(**stored["markers"])})
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{file}: not a contract ({error}); export the run again") from error

    def fingerprint(self) -> str:
        """Of everything but the probes; equal contracts give equal token ids and pooling."""
        stated = {key: value for key, value in asdict(self).items() if key != "probes" and (key != "prompts" or value)}
        return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()[:16]
