"""Document transforms for pretraining: fill-in-the-middle, prefix LM, span corruption, MLM, diffusion.

A transform takes one piece of a document, as cut by packing. Its random draws are a function of (seed, row of the run,
index in the row): every epoch masks other tokens, and the result does not depend on hosts or batch size. Validation
rows are keyed by their own row number and are always the same. If a transform lengthens a piece, packing reads the new
length from `growth` before it cuts.

Shape letters: N tokens of a piece, C choices, L row length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from data.packing import CounterRng, RowSlice, plain
from data.tokenizers.tokenizer import Tokenizer

Names = tuple[str, ...]  # spellings of one special token; the first is added to a tokenizer that has none of them
FIM_PREFIX: Names = ("<|fim_prefix|>", "<fim_prefix>", "<fim-prefix>", "[PREFIX]", "<PRE>", "▁<PRE>", "<｜fim▁begin｜>")
FIM_SUFFIX: Names = ("<|fim_suffix|>", "<fim_suffix>", "<fim-suffix>", "[SUFFIX]", "<SUF>", "▁<SUF>", "<｜fim▁hole｜>")
FIM_MIDDLE: Names = ("<|fim_middle|>", "<fim_middle>", "<fim-middle>", "[MIDDLE]", "<MID>", "▁<MID>", "<｜fim▁end｜>")
MASK: Names = ("<|mask|>", "[MASK]", "<mask>", "<|mdm_mask|>")
MODES: dict[str, Names] = {"R": ("[R]", "[NLU]"), "X": ("[X]", "[NLG]"), "S": ("[S]", "[S2S]")}
LEAST_RATIO = 1e-3  # minimum mask ratio in diffusion: LLaDA, appendix B


class Transform(Protocol):
    """Maps a piece of a document to row contents."""

    growth: np.ndarray | None  # [C, L + 1]: transformed length of a piece of n tokens, by choice; None: n
    same_place: bool  # targets are the tokens at the same position, not the next ones

    def __call__(self, found: np.ndarray, size: int, draws: CounterRng, choice: int) -> RowSlice:
        """`found`: the piece's `size` tokens, plus the next token of the document, if any."""
        ...


@dataclass
class TransformConfig:
    """Base of the transform configs; kind=none leaves documents unchanged."""

    kind: str = "none"

    @property
    def in_place(self) -> bool:
        """Whether targets are the hidden tokens at their own positions, instead of next tokens."""
        return False

    def special_tokens(self, seq_len: int) -> list[Names]:
        """Returns the special tokens that the transform requires."""
        return []

    def missing_special_tokens(self, special: Mapping[str, int] | Sequence[str], seq_len: int) -> list[str]:
        """Returns the required special tokens that are not in `special`."""
        return [names[0] for names in self.special_tokens(seq_len) if not any(name in special for name in names)]

    def build(self, tokenizer: Tokenizer, seq_len: int) -> Transform | None:
        """Builds the transform; None leaves documents unchanged. Raises: ValueError naming an invalid key."""
        return None

    def _tokens(self, tokenizer: Tokenizer, seq_len: int) -> list[int]:
        """Returns the ids of `special_tokens`, in order. Raises: ValueError if the tokenizer lacks one."""
        special = tokenizer.special_tokens
        if missing := self.missing_special_tokens(special, seq_len):
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(
                f"data.transform.kind={self.kind}: needs the special tokens {', '.join(missing[:3])}{more}, which the "
                "tokenizer does not have. They are added to a tokenizer built by the run, but not to one loaded with "
                "init_from: start from weights whose tokenizer has them, or set tokenizer=NAME; if sentinels are "
                "missing, a shorter data.seq_len needs fewer"
            )
        return [special[next(name for name in names if name in special)] for names in self.special_tokens(seq_len)]


# Infilling


@dataclass
class FimConfig(TransformConfig):
    """Fill-in-the-middle (Bavarian et al. 2022), applied per piece ("context-level", section 4.4)."""

    kind: str = "fim"
    # fraction of pieces to transform; the others are unchanged
    rate: float = field(default=0.5, metadata={"min": 0, "max": 1})
    # fraction of transformed pieces in suffix-first (SPM) order
    spm_rate: float = field(default=0.5, metadata={"min": 0, "max": 1})

    def special_tokens(self, seq_len: int) -> list[Names]:
        return [FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE]

    def build(self, tokenizer: Tokenizer, seq_len: int) -> "Fim":
        if seq_len < 8:
            raise ValueError(f"data.seq_len={seq_len}: too short for data.transform.kind=fim; take at least 8")
        sizes = np.arange(seq_len + 1)
        growth = np.where(sizes > 0, sizes + 3 + (tokenizer.eos_id is not None), 0)[None]
        return Fim(self, self._tokens(tokenizer, seq_len), tokenizer.bos_id, tokenizer.eos_id, growth)


@dataclass(frozen=True)
class Fim:
    """Reorders a piece as PSM or SPM; every token contributes to the loss.

    PSM is `<pre> prefix <suf> suffix <mid> middle eos`; SPM is `<pre> <suf> suffix <mid> prefix middle eos`, the
    variant that shares its parts with PSM (section 3). The middle is bounded by two uniform draws over the tokens; EOS
    marks where the middle meets the suffix, also in a piece cut from a longer document. `growth` reserves room for
    sentinels and EOS in unchanged pieces, too.
    """

    config: FimConfig
    sentinels: Sequence[int]
    bos_id: int | None
    eos_id: int | None
    growth: np.ndarray
    same_place = False

    def __call__(self, found: np.ndarray, size: int, draws: CounterRng, choice: int) -> RowSlice:
        if draws.uniform(1)[0] >= self.config.rate:
            return plain(found, size)
        ids = found[:size]
        head = ids[:1] if self.bos_id is not None and ids[0] == self.bos_id else ids[:0]
        body = ids[len(head) : size - (self.eos_id is not None and int(ids[-1]) == self.eos_id)]
        first, second = sorted(draws.below(len(body) + 1) for _ in range(2))
        before, middle, after = body[:first], body[first:second], body[second:]
        pre, suf, mid = ([token] for token in self.sentinels)
        end = [] if self.eos_id is None else [self.eos_id]
        if draws.uniform(1)[0] < self.config.spm_rate:
            parts = head, pre, suf, after, mid, before, middle, end
        else:
            parts = head, pre, before, suf, after, mid, middle, end
        made = np.concatenate(parts).astype(np.int32)
        return plain(made, len(made))


@dataclass
class PrefixLmConfig(TransformConfig):
    """Prefix LM (Raffel et al. 2020, section 3.2.1): the loss covers only the tokens after a prefix.

    `model.attention.mask=prefix` makes attention bidirectional within the prefix.
    """

    kind: str = "prefix_lm"

    def build(self, tokenizer: Tokenizer, seq_len: int) -> "PrefixLm":
        return PrefixLm()


@dataclass(frozen=True)
class PrefixLm:
    """Draws the end of the prefix uniformly, with at least one token before and after it."""

    growth = None
    same_place = False

    def __call__(self, found: np.ndarray, size: int, draws: CounterRng, choice: int) -> RowSlice:
        result = plain(found, size)
        border = 1 + draws.below(max(size - 1, 1))  # first token in the loss, as the target of the one before it
        result.mask[: border - 1] = 0
        return result


# Spans


class Denoiser(NamedTuple):
    mean_span: float | None  # tokens; None: one span, the end of the piece
    density: float  # fraction of tokens in spans
    mode: str | None = None  # key of `MODES`


# Tay et al. 2022, table 1: regular, extreme, sequential denoising.
UL2 = (
    Denoiser(3, 0.15, "R"), Denoiser(8, 0.15, "R"),
    Denoiser(3, 0.5, "X"), Denoiser(8, 0.5, "X"), Denoiser(64, 0.15, "X"), Denoiser(64, 0.5, "X"),
    Denoiser(None, 0.25, "S"),
)  # fmt: skip


def span_numbers(size: np.ndarray | int, denoiser: Denoiser) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers of masked tokens and of spans for pieces of at least 2 tokens.

    Counts as T5's `random_spans_noise_mask`.
    """
    size = np.asarray(size)
    noise = np.clip(np.round(size * denoiser.density), 1, size - 1).astype(np.int64)
    if denoiser.mean_span is None:
        return noise, np.ones_like(noise)
    spans = np.maximum(np.round(noise / denoiser.mean_span), 1).astype(np.int64)
    return noise, np.minimum(spans, np.minimum(noise, size - noise))  # spans must be non-empty and not adjacent


def span_mask(size: int, denoiser: Denoiser, draws: CounterRng) -> np.ndarray:
    """Returns [N] bool: the masked tokens. Span lengths and gap lengths are random partitions (T5)."""
    noise, spans = map(int, span_numbers(size, denoiser))
    gaps, hidden = (_partition(total, spans, draws) for total in (size - noise, noise))
    lengths = np.stack([gaps, hidden], 1).reshape(-1)
    return np.repeat(np.tile([False, True], spans), lengths)


def _partition(total: int, parts: int, draws: CounterRng) -> np.ndarray:
    """Returns [parts] positive lengths that sum to `total`, uniform over all such partitions."""
    borders = np.sort(draws.order(total - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], borders, [total]]))


@dataclass
class SpansConfig(TransformConfig):
    """Base of the transforms that mask spans."""

    def denoisers(self) -> Sequence[Denoiser]:
        """Returns the denoisers to choose from. Raises: ValueError naming an invalid key."""
        raise TypeError(f"data.transform.kind={self.kind}: choose one with transform=NAME")

    def special_tokens(self, seq_len: int) -> list[Names]:
        denoisers = self.denoisers()
        modes = [MODES[mode] for mode in dict.fromkeys(d.mode for d in denoisers) if mode is not None]
        sizes = np.arange(2, max(seq_len, 2) + 1)
        # Ignores the EOS token after the targets: the tokenizer may have none.
        fitting = lambda d: np.maximum(span_numbers(sizes, d)[1] * (_length(sizes, d, 0) <= seq_len), 1)
        most = max(int(fitting(d).max()) for d in denoisers)
        return [*modes, *((f"<extra_id_{i}>",) for i in range(most))]

    def build(self, tokenizer: Tokenizer, seq_len: int) -> "SpanCorruption":
        denoisers = self.denoisers()
        tokens = self._tokens(tokenizer, seq_len)
        modes = list(dict.fromkeys(d.mode for d in denoisers if d.mode is not None))
        sizes, ends = np.arange(2, seq_len + 1), int(tokenizer.eos_id is not None)
        growth = np.stack([np.concatenate([[0, 1], _length(sizes, d, ends)])[: seq_len + 1] for d in denoisers])
        if seq_len < 2 or growth[:, 2].max() > seq_len:
            raise ValueError(f"data.seq_len={seq_len}: too short for data.transform.kind={self.kind}; take at least 8")
        ids = dict(zip(modes, tokens, strict=False)), tokens[len(modes) :]
        return SpanCorruption(denoisers, *ids, tokenizer.eos_id, growth)


@dataclass
class SpanCorruptionConfig(SpansConfig):
    """T5 span corruption (Raffel et al. 2020, section 3.1.4) for a decoder: masked spans follow the corrupted text."""

    kind: str = "span_corruption"
    density: float = field(default=0.15, metadata={"above": 0, "below": 1})  # fraction of tokens to mask
    mean_span: float = field(default=3.0, metadata={"min": 1})  # mean span length, in tokens

    def denoisers(self) -> Sequence[Denoiser]:
        return (Denoiser(self.mean_span, self.density),)


@dataclass
class Ul2Config(SpansConfig):
    """UL2 mixture of denoisers (Tay et al. 2022, table 1), one drawn uniformly per piece.

    The denoiser determines the length of a piece and thereby how documents are cut, so it is the same in every epoch;
    the spans differ.
    """

    kind: str = "ul2"

    def denoisers(self) -> Sequence[Denoiser]:
        return UL2


def _length(size: np.ndarray, denoiser: Denoiser, ends: int) -> np.ndarray:
    """Returns the transformed length of pieces of at least 2 tokens; each span adds two sentinels."""
    return size + 2 * span_numbers(size, denoiser)[1] + (denoiser.mode is not None) + ends


@dataclass(frozen=True)
class SpanCorruption:
    """Masks spans with sentinels and appends the spans as targets.

    The row is `[mode] text with sentinels` followed by `sentinel span sentinel span ... eos`; the loss covers only the
    second part. A piece of one token has no span and does not contribute to the loss.
    """

    denoisers: Sequence[Denoiser]
    modes: Mapping[str, int]
    sentinels: Sequence[int]
    end: int | None
    growth: np.ndarray
    same_place = False

    def __call__(self, found: np.ndarray, size: int, draws: CounterRng, choice: int) -> RowSlice:
        ids, denoiser = found[:size].astype(np.int32), self.denoisers[choice]
        if size < 2:
            return RowSlice(ids, np.zeros_like(ids), np.zeros(size, np.float32))
        hidden = span_mask(size, denoiser, draws)
        starts = hidden & ~np.concatenate([[False], hidden[:-1]])
        span = np.cumsum(starts) - 1  # span index of each masked token
        sentinels = np.asarray(self.sentinels, np.int32)
        marked = np.where(starts, sentinels[np.maximum(span, 0)], ids)
        source = marked[~hidden | starts]
        if denoiser.mode is not None:
            source = np.concatenate([[self.modes[denoiser.mode]], source])
        at = np.flatnonzero(starts[hidden])
        written = np.insert(ids[hidden], at, sentinels[: len(at)])
        end = [] if self.end is None else [self.end]
        made = np.concatenate([source, written, end]).astype(np.int32)
        result = plain(made, len(made))
        result.mask[: len(source) - 1] = 0
        return result


# Masks in place


@dataclass
class MlmConfig(TransformConfig):
    """Masked language modeling (Devlin et al. 2019, section 3.1)."""

    kind: str = "mlm"
    # fraction of tokens to predict, at least one per piece; special tokens are never selected
    rate: float = field(default=0.15, metadata={"min": 0, "max": 1})
    # fraction of selected tokens replaced by the mask token
    mask_share: float = field(default=0.8, metadata={"min": 0, "max": 1})
    # fraction of selected tokens replaced by a random token; the rest are unchanged
    random_share: float = field(default=0.1, metadata={"min": 0, "max": 1})

    @property
    def in_place(self) -> bool:
        return True

    def special_tokens(self, seq_len: int) -> list[Names]:
        return [MASK]

    def build(self, tokenizer: Tokenizer, seq_len: int) -> "Mlm":
        if self.mask_share + self.random_share > 1:
            raise ValueError(
                f"data.transform.random_share={self.random_share}: must not exceed 1 - mask_share "
                f"(data.transform.mask_share={self.mask_share})"
            )
        special = {*tokenizer.special_tokens.values(), *(i for i in tokenizer.special_ids.values() if i is not None)}
        ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), sorted(special))
        return Mlm(self, self._tokens(tokenizer, seq_len)[0], ordinary)


@dataclass(frozen=True)
class Mlm:
    config: MlmConfig
    mask: int
    ordinary: np.ndarray  # ids of non-special tokens, ascending
    growth = None
    same_place = True

    def __call__(self, found: np.ndarray, size: int, draws: CounterRng, choice: int) -> RowSlice:
        ids = found[:size].astype(np.int32)
        places = np.flatnonzero(np.isin(ids, self.ordinary))
        count = max(round(len(places) * self.config.rate), min(len(places), 1))
        chosen = places[draws.order(len(places))[:count]]
        fate, other = draws.uniform(count), (draws.uniform(count) * len(self.ordinary)).astype(np.int64)
        masked, replaced = self.config.mask_share, self.config.mask_share + self.config.random_share
        tokens, weights = ids.copy(), np.zeros(size, np.float32)
        unmasked = np.where(fate < replaced, self.ordinary[other], ids[chosen])
        tokens[chosen] = np.where(fate < masked, self.mask, unmasked)
        weights[chosen] = 1
        return RowSlice(tokens, ids, weights)


@dataclass
class DiffusionConfig(TransformConfig):
    """Masked diffusion (Sahoo et al. 2024, MDLM; Nie et al. 2025, LLaDA, equation 3).

    Masks each token independently with probability t, drawn uniformly per piece; the loss weight is 1 / t.
    """

    kind: str = "diffusion"

    @property
    def in_place(self) -> bool:
        return True

    def special_tokens(self, seq_len: int) -> list[Names]:
        return [MASK]

    def build(self, tokenizer: Tokenizer, seq_len: int) -> "Diffusion":
        return Diffusion(self._tokens(tokenizer, seq_len)[0])


@dataclass(frozen=True)
class Diffusion:
    mask: int
    growth = None
    same_place = True

    def __call__(self, found: np.ndarray, size: int, draws: CounterRng, choice: int) -> RowSlice:
        ids = found[:size].astype(np.int32)
        ratio = LEAST_RATIO + (1 - LEAST_RATIO) * draws.uniform(1)[0]
        masked = draws.uniform(size) < ratio
        return RowSlice(np.where(masked, self.mask, ids).astype(np.int32), ids, (masked / ratio).astype(np.float32))
