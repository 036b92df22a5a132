"""SGPT-CE: a document is scored by the log-probability that a decoder gives to the query after a prompt that holds the
document.

    reranker = CrossEncoder.from_pretrained("EleutherAI/gpt-neo-125M")
    reranker.score(["what is bitfit"], ["BitFit trains the biases alone."])  # [1], natural logarithm

Nothing is trained (Muennighoff 2022, SGPT, section 3). As in the original the query is tokenised on its own, directly
behind the prompt; the sum is not divided by its length; and where a pair is longer than the model, the beginning of the
document is cut, never the instruction, the prompt's tail or the query. Two variations, off by default: the mean over
the query's tokens, and minus the score of an empty document (as OpenAI's search endpoint had it), which takes out how
likely the query is by itself.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sgpt.cross_encoder.likelihood import ScoredText, log_probabilities
from sgpt.cross_encoder.prompts import PromptConfig, build_prompt
from sgpt.decoder.attention import prepare
from sgpt.decoder.base_folder import local_folder
from sgpt.decoder.families import LENGTH_WITHOUT_TABLE, family_of, looks_both_ways, position_limit
from sgpt.decoder.model_files import CONFIG, check_config, read_json
from sgpt.decoder.packing import fitting_tokens
from sgpt.decoder.trunk import ModelConfig, check_family, check_vocabulary, load_tokenizer, open_model, takes_packs
from sgpt.runtime.errors import InputError
from sgpt.runtime.progress import progress_bar

log = logging.getLogger(__name__)
Ids = tuple[int, ...]
TOKENS_PER_PACK = 4096  # on a CPU, and where texts are padded


@dataclass
class ScoreConfig:
    """Variations on the sum of the query's log-probabilities, which the original takes."""

    mean: bool = False
    """The mean over the query's tokens instead of their sum."""
    prior: bool = False
    """Minus the score of an empty document, which takes out how likely the query is by itself."""


class CrossEncoder:
    """A causal language model, its tokenizer and a prompt.

    `model.base_model` is prepared (sgpt/decoder/attention.py). tokens_per_pack: None is what suits the device.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        prompt: PromptConfig | str = "G",
        *,
        scoring: ScoreConfig | None = None,
        tokens_per_pack: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.tokens_per_pack = model, tokenizer, tokens_per_pack
        self.prompt = build_prompt(PromptConfig(prompt) if isinstance(prompt, str) else prompt)
        self.scoring = scoring or ScoreConfig()
        check_vocabulary(tokenizer, model)
        self.max_tokens = position_limit(model.base_model) or LENGTH_WITHOUT_TABLE
        empty = tokenizer("")["input_ids"]
        adds_bos = bool(empty) and empty[0] == tokenizer.bos_token_id
        self.bos: Ids = tuple(empty[:1]) if adds_bos else ()  # Llama and OPT were trained with it
        instruction = self.prompt.instruction
        self.instruction_tokens = len(self.bos) + len(self._tokens([instruction])[instruction])
        self.answer_ids, self.answer_prefix = self._answer_tokens()
        self.priors: dict[str, float] = {}  # of queries, with an empty document

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        prompt: PromptConfig | str = "G",
        *,
        dtype: str = "float32",
        **options,
    ) -> "CrossEncoder":
        """A local folder or hub id of a decoder with its language-model head. Raises InputError for an encoder."""
        return cls(load_language_model(ModelConfig(str(path), dtype)), load_tokenizer(str(path)), prompt, **options)

    @property
    def pack_size(self) -> int:
        """Tokens of a pack: `tokens_per_pack`, or what suits the device."""
        trunk = self.model.base_model
        if not takes_packs(trunk):  # its padded texts have logits at every position
            return self.tokens_per_pack or TOKENS_PER_PACK
        return self.tokens_per_pack or fitting_tokens(trunk, self.model.device, TOKENS_PER_PACK)

    def score(self, queries: Sequence[str], documents: Sequence[str], *, progress: bool | None = None) -> np.ndarray:
        """Scores of the pairs (queries[i], documents[i]): float64 [pairs], natural logarithm, higher is better.

        Equal pairs are scored once. Raises InputError for an empty query, and for one that does not fit the model
        together with the prompt.
        """
        sums = self.log_likelihoods(queries, documents, progress=progress)
        if self.scoring.prior:
            unknown = [query for query in dict.fromkeys(queries) if query not in self.priors]
            priors = self.log_likelihoods(unknown, [""] * len(unknown), progress=False).tolist()
            self.priors |= dict(zip(unknown, priors, strict=True))
            sums = sums - np.array([self.priors[query] for query in queries])
        if self.scoring.mean and not self.answer_ids:  # an answer is one token
            sums = sums / self.query_tokens(queries)
        return sums

    def log_likelihoods(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        *,
        progress: bool | None = None,
    ) -> np.ndarray:
        """log p(query | prompt with document), float64 [pairs]: what `score` is made of."""
        texts = self.scored_texts(queries, documents)
        with progress_bar(f"scoring {len(texts):,} pairs", len(set(texts)), progress) as advance:
            options = {"tokens_per_pack": self.pack_size, "choices": self.answer_ids, "advance": advance}
            sums = log_probabilities(self.model, texts, **options).numpy()
        if not np.isfinite(sums).all():
            pair = int(np.flatnonzero(~np.isfinite(sums))[0])
            raise InputError(
                f"score: pair {pair} (query {queries[pair]!r:.60}, document {documents[pair]!r:.60}) has the score "
                f"{sums[pair]}; {type(self.model).__name__} gives NaN or infinite numbers in {self.model.dtype}: try "
                "float32, or another model"
            )
        return sums

    def query_tokens(self, queries: Sequence[str]) -> np.ndarray:
        """Number of tokens of each query, over which its score is summed, int64 [queries]."""
        ids = self._tokens(queries)
        return np.array([len(ids[query]) for query in queries], dtype=np.int64)

    def scored_texts(self, queries: Sequence[str], documents: Sequence[str]) -> list[ScoredText]:
        """Token ids of the pairs, cut to the model's length; those of one document are a group.

        Raises InputError for an empty query, and for one that does not fit the model together with the prompt.
        """
        if isinstance(queries, str) or isinstance(documents, str) or len(queries) != len(documents):
            raise InputError(
                f"score takes a list of queries and as many documents; got {len(queries)} and {len(documents)}"
            )
        blank = next((number for number, query in enumerate(queries) if not query.strip()), None)
        if blank is not None:
            raise InputError(
                f"query {blank} is empty ({queries[blank]!r}): it has no token whose probability could be a score; "
                "leave it out"
            )
        pairs = list(zip(queries, documents, strict=True))
        contexts = [self.prompt.before_query(document, query) for query, document in pairs]
        tails = [self.prompt.behind_document(query) for query in queries]
        ids = self._tokens({*contexts, *tails, *queries})
        groups = {document: number for number, document in enumerate(dict.fromkeys(documents))}
        texts = []
        for (query, document), context, tail in zip(pairs, contexts, tails, strict=True):
            before = (*ids[context], *self.answer_prefix)
            scored = self.answer_ids[:1] or ids[query]
            texts.append(self._cut(before, scored, len(ids[tail]), groups[document], query))
        return texts

    def _cut(self, context: Ids, scored: Ids, tail: int, group: int, query: str) -> ScoredText:
        """The original's cut: the instruction, then the rightmost tokens of document, tail and what is scored.

        context: ids of all that stands before what is scored; tail: how many of them are behind the document.
        `max_tokens` are read in all.
        """
        context = (*self.bos, *context)
        room = self.max_tokens + 1 - self.instruction_tokens  # one more than is read: the last token is only predicted
        if tail + len(scored) > room:
            raise InputError(
                f"query {query[:60]!r} takes {tail + len(scored)} tokens with the prompt's tail, and of the model's "
                f"{self.max_tokens} positions the instruction leaves {room}; shorten the query or the prompt"
            )
        instruction, behind = context[: self.instruction_tokens], context[self.instruction_tokens :]
        cut = max(0, len(behind) + len(scored) - room)
        ids = (*instruction, *(*behind, *scored)[-room:])
        if len(ids) == len(scored):  # the first scored token needs one before it
            ids = (self.tokenizer.eos_token_id, *ids)
        return ScoredText(ids, len(scored), group, cut)

    def _tokens(self, texts: Iterable[str]) -> dict[str, Ids]:
        """text -> its token ids, without special tokens."""
        different = list(dict.fromkeys(texts))
        ids = self.tokenizer(different, add_special_tokens=False)["input_ids"] if different else []
        return {text: tuple(row) for text, row in zip(different, ids, strict=True)}

    def _answer_tokens(self) -> tuple[Ids, Ids]:
        """The first token in which the answers differ, of each; and those before it, which all share.

        A vocabulary may know " Yes" as a blank and a word.
        """
        tokens = self._tokens(self.prompt.answers)
        ids = [tokens[answer] for answer in self.prompt.answers]
        shared = 0
        for column in zip(*ids, strict=False):
            if len(set(column)) > 1:
                break
            shared += 1
        first = tuple(row[shared] for row in ids if shared < len(row))
        if len(set(first)) < len(ids):
            raise InputError(
                f"prompt answers {list(self.prompt.answers)} cannot be told apart by one token of this vocabulary; "
                "choose other answers"
            )
        return first, ids[0][:shared] if ids else ()


def load_language_model(config: ModelConfig) -> nn.Module:
    """A decoder with its language-model head, prepared, in evaluation mode.

    Raises InputError for an encoder, and for a folder without the head, which would score at random and say nothing.
    """
    folder = local_folder(config.path)
    check_config(folder, config.path)
    stated = read_json(folder / CONFIG)
    family = stated["model_type"]
    if looks_both_ways(stated) or family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(
            f"{config.path}: {family} predicts no next token; re-rank with a decoder such as EleutherAI/gpt-neo-125m"
        )
    model = open_model(config, AutoModelForCausalLM)
    if not family_of(family).packed:
        log.warning(
            "%s: nothing is known of how its attention keeps texts apart, so texts are padded and no beginning is "
            "shared",
            family,
        )
    prepare(model.base_model)
    check_family(config.path, model.base_model, causal=True)
    return model
