"""What a model is shown of a document, and what it is to learn of it: infilling, prefixes, noise and what it hides.

A transform takes one piece of a document, as packing has cut it. Its draws are a function of (seed, row of the run,
place in the row), so that an epoch hides other tokens than the one before, and neither hosts nor batches change what
is hidden; held-out rows have numbers of their own, and are always the same. Where a piece grows, packing is told by
how much before it cuts.

Shape letters: N tokens of a piece, C choices, L length of a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from data.packing import CounterRng, RowSlice, plain
from data.tokenizers.tokenizer import Tokenizer

Names = tuple[str, ...]  # texts of which a tokenizer has one; the first is given to one that has none
FIM_PREFIX: Names = ("<|fim_prefix|>", "<fim_prefix>", "<fim-prefix>", "[PREFIX]", "<PRE>", "▁<PRE>", "<｜fim▁begin｜>")
FIM_SUFFIX: Names = ("<|fim_suffix|>", "<fim_suffix>", "<fim-suffix>", "[SUFFIX]", "<SUF>", "▁<SUF>", "<｜fim▁hole｜>")
FIM_MIDDLE: Names = ("<|fim_middle|>", "<fim_middle>", "<fim-middle>", "[MIDDLE]", "<MID>", "▁<MID>", "<｜fim▁end｜>")
MASK: Names = ("<|mask|>", "[MASK]", "<mask>", "<|mdm_mask|>")
MODES: dict[str, Names] = {"R": ("[R]", "[NLU]"), "X": ("[X]", "[NLG]"), "S": ("[S]", "[S2S]")}
LEAST_RATIO = 1e-3  # of masked tokens in diffusion: LLaDA, appendix B


class Transform(Protocol):
    """What a model is shown of pieces of documents."""

    growth: np.ndarray | None  # [C, L + 1]: what a piece of n tokens takes in a row, by choice; None: n tokens
    same_place: bool  # targets are of the token itself, not of the one that follows

    def __call__(self, found: np.ndarray, size: int, draws: CounterRng, choice: int) -> RowSlice:
        """`found`: the piece's `size` tokens, and the one that follows them in the document, if any."""
        ...


@dataclass
class TransformConfig:
    """Base of all transforms' configs, and documents as they are."""

    kind: str = "none"

    def special_tokens(self, seq_len: int) -> list[Names]:
        """Special tokens without which it cannot be."""
        return []

    def missing_special_tokens(self, special: Mapping[str, int] | Sequence[str], seq_len: int) -> list[str]:
        """Texts of the special tokens that a tokenizer with those of `special` lacks."""
        return [names[0] for names in self.special_tokens(seq_len) if not any(name in special for name in names)]

    def build(self, tokenizer: Tokenizer, seq_len: int) -> Transform | None:
        """None: documents stay as they are. Raises: ValueError naming the key of a value that cannot be."""
        return None

    def _tokens(self, tokenizer: Tokenizer, seq_len: int) -> list[int]:
        """Ids of the special tokens in the order of `special_tokens`. Raises: ValueError where the tokenizer has them not."""
        special = tokenizer.special_tokens
        if missing := self.missing_special_tokens(special, seq_len):
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(
                f"data.transform.kind={self.kind}: needs the special tokens {', '.join(missing[:3])}{more}, which the "
                "tokenizer does not have; a tokenizer that a run makes gets them, one that comes with init_from does "
                "not: begin from weights whose tokenizer has them, or choose a tokenizer=NAME anew; where sentinels "
                "are too few, a shorter data.seq_len needs less"
            )
        return [special[next(name for name in names if name in special)] for names in self.special_tokens(seq_len)]


def _check_shares(**shares: float) -> None:
    for key, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"data.transform.{key}={value}: is a share, from 0 to 1")


# Infilling


@dataclass
class FimConfig(TransformConfig):
    """Fill-in-the-middle (Bavarian et al. 2022), at the level of pieces: their section 4.4, "context-level"."""

    kind: str = "fim"
    rate: float = 0.5  # of pieces; the others stay as they are
    spm_rate: float = 0.5  # of those, suffix first

    def special_tokens(self, seq_len: int) -> list[Names]:
        return [FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE]

    def build(self, tokenizer: Tokenizer, seq_len: int) -> "Fim":
        _check_shares(rate=self.rate, spm_rate=self.spm_rate)
        if seq_len < 8:
            raise ValueError(f"data.seq_len={seq_len}: too short for data.transform.kind=fim; take at least 8")
        sizes = np.arange(seq_len + 1)
        growth = np.where(sizes > 0, sizes + 3 + (tokenizer.eos_id is not None), 0)[None]
        return Fim(self, self._tokens(tokenizer, seq_len), tokenizer.bos_id, tokenizer.eos_id, growth)


@dataclass(frozen=True)
class Fim:
    """`<pre> prefix <suf> suffix <mid> middle end`, or suffix first: `<pre> <suf> suffix <mid> prefix middle end`, the
    form that shares its parts with the other (section 3). All of it is learnt. The borders of the middle are two even
    draws over the tokens; the end of the document, or of the piece where it was cut, says that the middle has met its
    suffix. Room for sentinels and end is set aside also where a piece stays as it is.
    """

    config: FimConfig
    sentinels: Sequence[int]
    begin: int | None
    end: int | None
    growth: np.ndarray
    same_place = False

    def __call__(self, found: np.ndarray, size: int, draws: CounterRng, choice: int) -> RowSlice:
        if draws.uniform(1)[0] >= self.config.rate:
            return plain(found, size)
        ids = found[:size]
        head = ids[:1] if self.begin is not None and ids[0] == self.begin else ids[:0]
        body = ids[len(head) : size - (self.end is not None and int(ids[-1]) == self.end)]
        first, second = sorted(draws.below(len(body) + 1) for _ in range(2))
        before, middle, after = body[:first], body[first:second], body[second:]
        pre, suf, mid = ([token] for token in self.sentinels)
        end = [] if self.end is None else [self.end]
        if draws.uniform(1)[0] < self.config.spm_rate:
            parts = head, pre, suf, after, mid, before, middle, end
        else:
            parts = head, pre, before, suf, after, mid, middle, end
        made = np.concatenate(parts).astype(np.int32)
        return plain(made, len(made))


@dataclass
class PrefixLmConfig(TransformConfig):
    """A prefix that is not learnt, and the rest (Raffel et al. 2020, section 3.2.1). `model.attention.mask=prefix` lets
    the prefix see all of itself.
    """

    kind: str = "prefix_lm"

    def build(self, tokenizer: Tokenizer, seq_len: int) -> "PrefixLm":
        return PrefixLm()


@dataclass(frozen=True)
class PrefixLm:
    """The border is an even draw: at least one token before it, at least one after it."""

    growth = None
    same_place = False

    def __call__(self, found: np.ndarray, size: int, draws: CounterRng, choice: int) -> RowSlice:
        shown = plain(found, size)
        border = 1 + draws.below(max(size - 1, 1))  # the first token that is learnt: the target of the one before
        shown.mask[: border - 1] = 0
        return shown


# Spans


class Denoiser(NamedTuple):
    mean_span: float | None  # tokens; None: one span, the end of the piece
    density: float  # share of tokens in spans
    mode: str | None = None  # of `MODES`


# Tay et al. 2022, table 1: regular, extreme, sequential denoising.
UL2 = (
    Denoiser(3, 0.15, "R"), Denoiser(8, 0.15, "R"),
    Denoiser(3, 0.5, "X"), Denoiser(8, 0.5, "X"), Denoiser(64, 0.15, "X"), Denoiser(64, 0.5, "X"),
    Denoiser(None, 0.25, "S"),
)  # fmt: skip


def span_numbers(size: np.ndarray | int, denoiser: Denoiser) -> tuple[np.ndarray, np.ndarray]:
    """(tokens that are hidden, spans that they form) of pieces of at least 2 tokens, as T5's random_spans_noise_mask
    counts them.
    """
    size = np.asarray(size)
    noise = np.clip(np.round(size * denoiser.density), 1, size - 1).astype(np.int64)
    if denoiser.mean_span is None:
        return noise, np.ones_like(noise)
    spans = np.maximum(np.round(noise / denoiser.mean_span), 1).astype(np.int64)
    return noise, np.minimum(spans, np.minimum(noise, size - noise))  # fewer, where they would be empty or touch


def span_mask(size: int, denoiser: Denoiser, draws: CounterRng) -> np.ndarray:
    """[N] bool: the tokens that are hidden. Spans and what lies between them are random partitions (T5)."""
    noise, spans = map(int, span_numbers(size, denoiser))
    kept, hidden = (_partition(total, spans, draws) for total in (size - noise, noise))
    lengths = np.stack([kept, hidden], 1).reshape(-1)
    return np.repeat(np.tile([False, True], spans), lengths)


def _partition(total: int, parts: int, draws: CounterRng) -> np.ndarray:
    """[parts] lengths of at least 1 that add up to `total`, every way as likely as any other."""
    borders = np.sort(draws.order(total - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], borders, [total]]))


@dataclass
class SpansConfig(TransformConfig):
    """Base of those that hide spans."""

    def denoisers(self) -> Sequence[Denoiser]:
        """What pieces may be hidden by. Raises: ValueError naming the key of a value that cannot be."""
        raise TypeError(f"data.transform.kind={self.kind}: choose one with transform=NAME")

    def special_tokens(self, seq_len: int) -> list[Names]:
        denoisers = self.denoisers()
        modes = [MODES[mode] for mode in dict.fromkeys(d.mode for d in denoisers) if mode is not None]
        sizes = np.arange(2, max(seq_len, 2) + 1)
        # Without the token that ends targets: a tokenizer may have none.
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
    """Random spans are hidden, and written after the rest (Raffel et al. 2020, section 3.1.4), in one decoder."""

    kind: str = "span_corruption"
    density: float = 0.15  # share of tokens that are hidden
    mean_span: float = 3.0  # tokens

    def denoisers(self) -> Sequence[Denoiser]:
        if not 0 < self.density < 1:
            raise ValueError(f"data.transform.density={self.density}: must be above 0 and below 1")
        if self.mean_span < 1:
            raise ValueError(f"data.transform.mean_span={self.mean_span}: must be at least 1 token")
        return (Denoiser(self.mean_span, self.density),)


@dataclass
class Ul2Config(SpansConfig):
    """UL2's mixture of denoisers (Tay et al. 2022, table 1), each as likely, chosen once for each piece.

    What a piece is hidden by decides its length and so how documents are cut; it does not change from epoch to epoch,
    while the spans do.
    """

    kind: str = "ul2"

    def denoisers(self) -> Sequence[Denoiser]:
        return UL2


def _length(size: np.ndarray, denoiser: Denoiser, ends: int) -> np.ndarray:
    """Tokens in a row of pieces of at least 2 tokens: each span has a sentinel in its place and one before it."""
    return size + 2 * span_numbers(size, denoiser)[1] + (denoiser.mode is not None) + ends


@dataclass(frozen=True)
class SpanCorruption:
    """`[mode] text with sentinels` and then `sentinel span sentinel span ... end`, of which the second part is learnt.

    A piece of one token has nothing to hide, and nothing is learnt of it.
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
        begins = hidden & ~np.concatenate([[False], hidden[:-1]])
        span = np.cumsum(begins) - 1  # of each token, where it is hidden
        sentinels = np.asarray(self.sentinels, np.int32)
        marked = np.where(begins, sentinels[np.maximum(span, 0)], ids)
        source = marked[~hidden | begins]
        if denoiser.mode is not None:
            source = np.concatenate([[self.modes[denoiser.mode]], source])
        at = np.flatnonzero(begins[hidden])
        written = np.insert(ids[hidden], at, sentinels[: len(at)])
        end = [] if self.end is None else [self.end]
        made = np.concatenate([source, written, end]).astype(np.int32)
        shown = plain(made, len(made))
        shown.mask[: len(source) - 1] = 0
        return shown


# Masks in place


@dataclass
class MlmConfig(TransformConfig):
    """Masked language modelling (Devlin et al. 2019, section 3.1)."""

    kind: str = "mlm"
    rate: float = 0.15  # of tokens that are to be told, at least one of each piece; special tokens never
    mask_share: float = 0.8  # of those that are masked
    random_share: float = 0.1  # of those that another token stands for; the rest stay as they are

    def special_tokens(self, seq_len: int) -> list[Names]:
        return [MASK]

    def build(self, tokenizer: Tokenizer, seq_len: int) -> "Mlm":
        _check_shares(rate=self.rate, mask_share=self.mask_share, random_share=self.random_share)
        if self.mask_share + self.random_share > 1:
            raise ValueError(
                f"data.transform.random_share={self.random_share}: with mask_share={self.mask_share} more than all"
            )
        special = {*tokenizer.special_tokens.values(), *(i for i in tokenizer.special_ids.values() if i is not None)}
        ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), sorted(special))
        return Mlm(self, self._tokens(tokenizer, seq_len)[0], ordinary)


@dataclass(frozen=True)
class Mlm:
    config: MlmConfig
    mask: int
    ordinary: np.ndarray  # ids of tokens that are not special, ascending
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
        kept = np.where(fate < replaced, self.ordinary[other], ids[chosen])
        tokens[chosen] = np.where(fate < masked, self.mask, kept)
        weights[chosen] = 1
        return RowSlice(tokens, ids, weights)


@dataclass
class DiffusionConfig(TransformConfig):
    """Tokens are masked, each by itself, with a probability t that is an even draw for each piece, and weigh 1 / t
    (Sahoo et al. 2024, MDLM; Nie et al. 2025, LLaDA, equation 3).
    """

    kind: str = "diffusion"

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
