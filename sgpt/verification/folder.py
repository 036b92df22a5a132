"""A folder by every installed loader, and against the probes that it was saved with."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from sgpt.decoder.base_folder import local_folder
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.model_folder import OF_A_RUN, exports_in_other_formats, find_model
from sgpt.encoder.probes import TOLERANCE, changed_ids, probe_difference
from sgpt.encoder.verify import Deviation, deviations
from sgpt.runtime.errors import InputError


def verify_folder(model: str) -> Iterator[tuple[Path, Deviation]]:
    """The folder that was opened, and how far a loader is from the model; of a run its exports and its adapter.

    All are compared with the first folder as our own loader opens it in float32.
    """
    folders = list(dict.fromkeys(find_model(model, (part,)).folder for part in OF_A_RUN))
    of_ours = [folder for folder in folders if find_model(folder).is_ours] or folders[:1]
    encoder = Encoder.from_pretrained(of_ours[0], check=False)
    for folder in of_ours:
        if (since_saved := _since_saved(folder, encoder if folder == of_ours[0] else None)) is not None:
            yield folder, since_saved
        for deviation in deviations(folder, encoder):
            yield folder, deviation
    for folder in exports_in_other_formats(local_folder(model)):
        for deviation in deviations(folder, encoder):
            yield folder, deviation


def _since_saved(folder: Path, encoder: Encoder | None) -> Deviation | None:
    """All probes, the long ones too, as they were when the folder was saved; None where it has none.

    encoder: of the folder, where it is open already. None, too, for a folder that cannot be opened: that is said by our
    loader, next to what others make of it.
    """
    try:
        encoder = encoder or Encoder.from_pretrained(folder, check=False)
    except InputError:
        return None
    stored = encoder.contract.probes
    if not stored:
        return None
    changed = changed_ids(encoder, stored)
    difference = probe_difference(encoder.in_dtype(torch.float32).encode, stored)
    error = f"other token ids than it was saved with: {changed}" if changed else None
    if error is None and not difference <= TOLERANCE:
        error = f"its embeddings are off by {difference:.1e} of the largest entry from those that it was saved with"
    return Deviation("sgpt, since it was saved", "both", len(stored["texts"]), difference, TOLERANCE, np.nan, error)
