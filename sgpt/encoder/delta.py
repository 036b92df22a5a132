"""A bias delta over a frozen trunk that others use as well: put on and taken off without a copy."""

from pathlib import Path

from torch import Tensor, nn

from sgpt.encoder.adapter import DELTA, read_delta, read_trained, refuse_other_base
from sgpt.runtime.errors import InputError


class Delta:
    """The trained tensors of an adapter next to a frozen trunk that others use too: inside `with delta:` the trunk has
    them.

    Nothing is copied on entering: each parameter is given other storage, and its own again on leaving. Raises
    InputError for another base, and for low-rank adapters, which change the modules themselves.
    """

    def __init__(self, trunk: nn.Module, folder: Path) -> None:
        if not (folder / DELTA).is_file() or read_delta(folder)["form"] == "peft":
            raise InputError(
                f"{folder} is not the bias delta that tuning=bitfit or bitfit_norm saves, so encoder and re-ranker "
                "cannot share one trunk; search without re-ranking: python train/search.py run=<this run> rerank=false"
            )
        refuse_other_base(trunk, folder)
        trained = read_trained(folder, trunk)
        parameters = dict(trunk.named_parameters())
        self.inside = False
        self.pairs: list[tuple[nn.Parameter, Tensor]] = []  # each with what it does not have now
        for name, value in trained.items():
            parameter = parameters[name]
            self.pairs.append((parameter, value.to(parameter.device)))

    def __enter__(self) -> None:
        assert not self.inside, "entered twice, the trunk would be the base again"
        self._exchange()

    def __exit__(self, *failure) -> None:
        self._exchange()

    def _exchange(self) -> None:
        exchanged = []
        for parameter, value in self.pairs:
            exchanged.append((parameter, parameter.data))
            parameter.data = value
        self.pairs, self.inside = exchanged, not self.inside
