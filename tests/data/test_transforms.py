"""Transforms mask the right fractions and lose no token of a document."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.ranges import check_ranges
from data.batch import TokenBatch
from data.loader import DataConfig, Mixture, PackedRows, TokenLoader, make_rows, stack, validation_batches
from data.packing import CounterRng, Packing, TransformLengths, fold_seed, hashed, make_plan
from data.tokenizers.kinds import Bytes, BytesConfig, Characters, SentencePieceConfig, build_tokenizer, from_files
from data.transforms import (
    UL2,
    Denoiser,
    DiffusionConfig,
    FimConfig,
    MlmConfig,
    PrefixLmConfig,
    SpanCorruptionConfig,
    TransformConfig,
    Ul2Config,
    span_mask,
    span_numbers,
)

B, L = 8, 96
CONFIGS = [
    FimConfig(), PrefixLmConfig(), SpanCorruptionConfig(), SpanCorruptionConfig(density=0.5, mean_span=8), Ul2Config(),
    MlmConfig(), DiffusionConfig(),
]  # fmt: skip
every = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
END = 256


def tokenizer(config: TransformConfig, seq_len: int = L):
    return build_tokenizer(BytesConfig(), lambda: iter(()), lambda known: config.missing_special_tokens(known, seq_len))


def build(config: TransformConfig, seq_len: int = L):
    return config.build(tokenizer(config, seq_len), seq_len)


class Documents:
    """Documents of random bytes, each ending with EOS."""

    fingerprint = "documents"

    def __init__(self, lengths, seed: int = 0):
        self.lengths = np.array(lengths, np.int64)
        rng = np.random.default_rng(seed)
        self.texts = [np.append(rng.integers(0, 256, n - 1), END) for n in lengths]

    def document(self, index, start, stop):
        return self.texts[index][start:stop]

    def loss_mask(self, index, start, stop):
        return None


CORPUS = Documents(np.random.default_rng(1).integers(1, 400, 60))


def rows_of(config: TransformConfig, packing: Packing = Packing.concat, corpus=CORPUS) -> PackedRows:
    return PackedRows(corpus, seq_len=L, packing=packing, seed=5, transform=build(config))


def documents_of(row: TokenBatch) -> list[TokenBatch]:
    """Splits a row into its documents."""
    return [TokenBatch(*(f[row.segment_ids == s] for f in row)) for s in range(1, row.segment_ids.max() + 1)]


# What goes into rows


@every
@pytest.mark.parametrize("packing", list(Packing))
def test_pieces_fit_their_rows_and_every_token_appears_once(config, packing):
    rows = rows_of(config, packing)
    pieces = [p for row in range(len(rows)) for p in rows.plan.pieces(row)]
    seen = sorted((p.document, t) for p in pieces for t in range(p.start, p.stop))
    assert seen == [(d, t) for d, n in enumerate(CORPUS.lengths) for t in range(n)]
    for number in range(len(rows)):
        row, planned = rows[number], rows.plan.pieces(number)
        assert all(field.shape == (L,) for field in row)
        found = documents_of(row)
        assert len(found) == len(planned)
        for document in found:
            assert np.array_equal(document.positions, np.arange(len(document.tokens)))
        assert (row.loss_mask[row.segment_ids == 0] == 0).all()


@pytest.mark.parametrize("config", [SpanCorruptionConfig(), Ul2Config()], ids=lambda config: config.kind)
def test_the_plan_uses_the_transformed_length(config):
    rows = rows_of(config)
    wasted = 0
    for number in range(len(rows)):
        for document, (index, start, stop) in zip(documents_of(rows[number]), rows.plan.pieces(number), strict=True):
            assert len(document.tokens) == rows.growth.table[rows.growth.choice(index, start)][stop - start]
        wasted += int((rows[number].segment_ids == 0).sum())
    assert wasted / (len(rows) * L) < 0.03


@every
def test_draws_change_with_the_epoch_and_not_with_the_batch(config):
    mixture = Mixture({"a": CORPUS}, DataConfig(batch_size=B, seq_len=L, transform=config), 0, transform=build(config))
    count = len(mixture.rows["a"])
    small = TokenLoader(mixture, batch_size=2, slots=[0, 1], place=lambda b: b, prefetch=0)
    batches = [small.next_batch() for _ in range(4)]
    full = stack([mixture[i] for i in range(B)])
    for field in TokenBatch._fields:
        assert np.array_equal(np.concatenate([getattr(b, field) for b in batches]), getattr(full, field))
    again = {mixture.locate(i)[1]: i for i in range(count, 2 * count)}
    differ = [
        any(not np.array_equal(a, b) for a, b in zip(mixture[i], mixture[again[mixture.locate(i)[1]]], strict=True))
        for i in range(count)
    ]
    assert np.mean(differ) > 0.5, "infilling leaves half unchanged, and a single span is always the end"


@every
def test_validation_rows_are_always_the_same(config):
    take = lambda: list(
        validation_batches(rows_of(config), batch_size=B, slots=range(B), max_batches=2, place=lambda b: b)
    )
    for one, other in zip(take(), take(), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@every
def test_the_fingerprint_depends_on_the_transform(config):
    plain = Mixture({"a": CORPUS}, DataConfig(seq_len=L), 0)
    changed = Mixture({"a": CORPUS}, DataConfig(seq_len=L, transform=config), 0, transform=build(config))
    assert plain.fingerprint != changed.fingerprint


def test_draws_are_pinned():
    # A run resumed after an upgrade must mask the same tokens.
    assert fold_seed(7) == int(hashed(7, 1)[0]) and fold_seed(7, 9) == int(hashed(fold_seed(7) ^ 9, 1)[0])
    draws = CounterRng(1, 2, 3)
    assert [draws.below(1000) for _ in range(3)] == [506, 407, 767]
    assert draws.order(5).tolist() == [3, 1, 2, 0, 4]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(8, 24), st.sampled_from(list(Packing)))
@settings(max_examples=50, deadline=None)
def test_growing_pieces_never_overflow(lengths, seq_len, packing):
    growth = TransformLengths(build(Ul2Config(), seq_len).growth, 3)
    plan = make_plan(np.array(lengths), seq_len=seq_len, packing=packing, seed=0, growth=growth)
    for row in range(plan.num_rows):
        pieces = plan.pieces(row)
        assert pieces and sum(growth.table[growth.choice(d, a)][b - a] for d, a, b in pieces) <= seq_len


# Infilling


def parts_of(tokens: np.ndarray, special: dict[str, int]) -> tuple[np.ndarray, str]:
    """Returns the original document and the order (plain, psm, spm) of an infilled piece."""
    pre, suf, mid = (special[f"<|fim_{name}|>"] for name in ("prefix", "suffix", "middle"))
    if pre not in tokens:
        return tokens, "plain"
    at = {token: int(np.flatnonzero(tokens == token)[0]) for token in (pre, suf, mid)}
    assert tokens[-1] == END
    prefix, suffix = tokens[at[pre] + 1 : at[suf]], tokens[at[suf] + 1 : at[mid]]
    rest = tokens[at[mid] + 1 : -1]
    form = "psm" if at[suf] > at[pre] + 1 else "spm"
    return np.concatenate([prefix, rest, suffix]), form


def test_infilling_keeps_the_document():
    config = FimConfig()
    transform, special = build(config), tokenizer(config).special_tokens
    forms = []
    for key in range(600):
        size = 40 + key % 7
        text = np.append(np.random.default_rng(key).integers(0, 256, size - 1), END)
        shown = transform(text, size, CounterRng(key), 0)
        again, form = parts_of(shown.tokens, special)
        assert np.array_equal(again, text if form == "plain" else text[:-1])
        assert np.array_equal(shown.targets[:-1], shown.tokens[1:]), "every token is in the loss"
        assert shown.mask.tolist() == [1] * (len(shown.tokens) - 1) + [0]
        assert len(shown.tokens) == size + 3 * (form != "plain") <= transform.growth[0][size]
        forms.append(form)
    shares = {form: forms.count(form) / len(forms) for form in ("plain", "psm", "spm")}
    assert shares == pytest.approx({"plain": 0.5, "psm": 0.25, "spm": 0.25}, abs=0.06)


def test_a_cut_piece_ends_where_its_middle_meets_its_suffix():
    config = FimConfig(rate=1.0, spm_rate=0.0)
    text = np.arange(20)
    shown = build(config)(text, 19, CounterRng(0), 0)  # token 19 follows it in the document
    again, form = parts_of(shown.tokens, tokenizer(config).special_tokens)
    assert form == "psm" and np.array_equal(again, text[:19]) and shown.tokens[-1] == END


# Prefixes


def test_a_prefix_is_not_in_the_loss_and_its_end_is_uniform():
    transform, size = build(PrefixLmConfig()), 11
    text = np.arange(size)
    borders = []
    for key in range(4000):
        shown = transform(text, size, CounterRng(key), 0)
        assert np.array_equal(shown.tokens, text)
        first = int(np.argmax(shown.mask)) + 1  # first token in the loss
        assert shown.mask.tolist() == [0] * (first - 1) + [1] * (size - first) + [0]
        borders.append(first)
    counts = np.bincount(borders, minlength=size)[1:]
    assert counts.min() > 300 and counts.max() < 500 and len(counts) == size - 1


# Spans


def t5_numbers(length: int, density: float, mean: float) -> tuple[int, int]:
    """`random_spans_noise_mask` of google-research/text-to-text-transfer-transformer, line by line."""
    noise = int(np.round(length * density))
    noise = min(max(noise, 1), length - 1)
    return noise, max(int(np.round(noise / mean)), 1)


@pytest.mark.parametrize("density,mean", [(0.15, 3.0), (0.15, 8.0), (0.5, 3.0), (0.5, 64.0), (0.3, 2.0)])
def test_masked_tokens_and_spans_match_t5(density, mean):
    for length in (2, 3, 7, 10, 30, 100, 512, 1023):
        denoiser = Denoiser(mean, density)
        noise, spans = t5_numbers(length, density, mean)
        assert tuple(map(int, span_numbers(length, denoiser))) == (noise, spans)
        for key in range(5):
            mask = span_mask(length, denoiser, CounterRng(key, length))
            edges = np.diff(mask.astype(int), prepend=0)
            assert mask.sum() == noise and (edges == 1).sum() == spans and not mask[0] and mask[-1]


def test_spans_are_uniform_partitions():
    found = [tuple(np.flatnonzero(span_mask(10, Denoiser(2, 0.4), CounterRng(key)))) for key in range(9000)]
    ways = {way: found.count(way) for way in set(found)}
    assert len(ways) == math.comb(5, 1) * math.comb(3, 1)  # 6 visible and 4 masked tokens, each in two parts
    assert min(ways.values()) > 500 and max(ways.values()) < 700


def rebuilt(document: TokenBatch, sentinels: list[int]) -> tuple[np.ndarray, int]:
    """Returns the original text, with spans restored, and the index of the first target."""
    first = int(np.argmax(document.loss_mask)) + 1
    source, written = document.tokens[:first].tolist(), document.tokens[first:].tolist()
    assert written[-1] == END
    spans: dict[int, list[int]] = {}
    for token in written[:-1]:
        if token in sentinels:
            spans[token] = []
            last = token
        else:
            spans[last].append(token)
    assert list(spans) == sentinels[: len(spans)] == [t for t in source if t in sentinels]
    return np.array([t for token in source for t in spans.get(token, [token])]), first


@pytest.mark.parametrize("config", [CONFIGS[2], CONFIGS[3], CONFIGS[4]], ids=["short", "long", "ul2"])
def test_corrupted_text_and_its_targets_restore_the_document(config):
    names = tokenizer(config).special_tokens
    sentinels = [i for text, i in names.items() if text.startswith("<extra_id_")]
    modes = {i: text[1] for text, i in names.items() if len(text) == 3}
    rows, seen = rows_of(config), set()
    for number in range(len(rows)):
        for document, (index, start, stop) in zip(documents_of(rows[number]), rows.plan.pieces(number), strict=True):
            text = CORPUS.texts[index][start:stop]
            if stop - start < 2:
                assert document.loss_mask.sum() == 0 and np.array_equal(document.tokens, text)
                continue
            again, first = rebuilt(document, sentinels)
            if config.kind == "ul2":
                denoiser = UL2[rows.growth.choice(index, start)]
                assert modes[int(again[0])] == denoiser.mode
                seen.add(denoiser)
                again = again[1:]
            assert np.array_equal(again, text)
            assert document.loss_mask.tolist() == [0] * (first - 1) + [1] * (len(document.tokens) - first) + [0]
            assert np.array_equal(document.targets[:-1], document.tokens[1:])
    assert config.kind != "ul2" or seen == set(UL2)


def test_sequential_denoising_hides_the_end():
    mask = span_mask(40, UL2[-1], CounterRng(0))
    assert np.array_equal(np.flatnonzero(mask), np.arange(30, 40))


# Masks in place


def test_masked_language_modeling_masks_its_fractions_and_no_special_token():
    config = MlmConfig()
    transform, mask = build(config), tokenizer(config).special_tokens["<|mask|>"]
    text = np.append(np.random.default_rng(0).integers(0, 256, 199), END)
    text[::20] = END
    counts = dict.fromkeys(("mask", "other", "same"), 0)
    for key in range(300):
        shown = transform(text, 200, CounterRng(key), 0)
        hidden = shown.mask > 0
        assert hidden.sum() == round((text != END).sum() * 0.15) and np.array_equal(shown.targets, text)
        assert np.array_equal(shown.tokens[~hidden], text[~hidden]) and (text[hidden] != END).all()
        now = shown.tokens[hidden]
        assert ((now < 256) | (now == mask)).all(), "no other special token replaces a token"
        counts["mask"] += int((now == mask).sum())
        counts["same"] += int((now == text[hidden]).sum())
        counts["other"] += int(((now != mask) & (now != text[hidden])).sum())
    total = sum(counts.values())
    shares = {name: count / total for name, count in counts.items()}
    by_chance = 0.1 / 256  # a random token equal to the original
    assert shares == pytest.approx({"mask": 0.8, "other": 0.1 - by_chance, "same": 0.1 + by_chance}, abs=0.01)


def test_the_weights_of_diffusion_integrate_every_ratio():
    # The mean weight of each pattern of k masks among n is the integral of t^(k-1) (1-t)^(n-k): a beta function.
    transform, n, count = build(DiffusionConfig()), 3, 40000
    mask = transform.mask
    sums = dict.fromkeys(itertools.product([False, True], repeat=n), 0.0)
    for key in range(count):
        shown = transform(np.arange(n), n, CounterRng(9, key), 0)
        assert np.array_equal(shown.tokens == mask, shown.mask > 0) and np.array_equal(shown.targets, np.arange(n))
        sums[tuple(shown.mask > 0)] += float(shown.mask.max())
    for pattern, total in sums.items():
        k = sum(pattern)
        exact = math.gamma(k) * math.gamma(n - k + 1) / math.gamma(n + 1) if k else 0.0
        assert total / count == pytest.approx(exact, rel=0.06, abs=0.005), pattern


# Tokenizers and mistakes


@pytest.mark.parametrize("kind", ["bytes", "characters", "sentencepiece"])
def test_missing_special_tokens_are_added_and_saved(kind):
    text, more = "the cat sat on the mat. " * 40, ["<|mask|>", "<|fim_prefix|>"]
    made = {
        "bytes": Bytes(),
        "characters": Characters("".join(sorted(set(text)))),
        "sentencepiece": SentencePieceConfig(vocab_size=300).build(lambda: iter([text])),
    }[kind]
    grown = made.with_special(more)
    assert [grown.special_tokens[t] for t in more] == [made.vocab_size, made.vocab_size + 1]
    assert grown.vocab_size == made.vocab_size + 2 == len(grown.token_bytes())
    assert grown.encode(text) == made.encode(text) and grown.decode([*grown.encode(text), made.vocab_size]) == text
    assert grown.with_special(more) is grown and grown.stop_ids == made.stop_ids
    again = from_files(grown.files())
    assert again.files() == grown.files() and again.special_tokens == grown.special_tokens
    assert again.encode_special("<|mask|>a").ids == grown.encode_special("<|mask|>a").ids


def test_a_trained_tokenizer_counts_them_in_its_size_and_known_spellings_are_found():
    text = ["the cat sat on the mat and the dog lay on the rug"] * 20
    config = SentencePieceConfig(vocab_size=320, special_tokens=["[MASK]"])
    made = build_tokenizer(config, lambda: iter(text), lambda known: MlmConfig().missing_special_tokens(known, L))
    assert "<|mask|>" not in made.special_tokens and MlmConfig().build(made, L).mask == made.special_tokens["[MASK]"]
    fim = build_tokenizer(config, lambda: iter(text), lambda known: FimConfig().missing_special_tokens(known, L))
    assert fim.special_tokens.keys() >= {"<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"}
    assert fim.vocab_size == made.vocab_size


@pytest.mark.parametrize(
    "config", [config for config in CONFIGS if config.special_tokens(L)], ids=lambda config: config.kind
)
def test_a_tokenizer_without_the_tokens_is_refused(config):
    with pytest.raises(ValueError, match=f"data.transform.kind={config.kind}: needs the special tokens"):
        make_rows(CORPUS, DataConfig(seq_len=L), 0, "a", config.build(Bytes(), L))


@pytest.mark.parametrize(
    "config,message",
    [
        (FimConfig(rate=1.5), "data.transform.rate=1.5: must be from 0 to 1"),
        (SpanCorruptionConfig(density=1.0), "density=1.0: must be above 0 and below 1"),
        (SpanCorruptionConfig(mean_span=0.5), "mean_span=0.5: must be at least 1"),
        (
            MlmConfig(mask_share=0.9, random_share=0.2),
            r"random_share=0.2: must not exceed 1 - mask_share \(data.transform.mask_share=0.9\)",
        ),
    ],
)
def test_invalid_values_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        check_ranges(config, "data.transform")
        config.build(Bytes(["<|mask|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]), L)


def test_rows_that_are_too_short_are_refused():
    with pytest.raises(ValueError, match=r"data\.seq_len=5: too short"):
        build(Ul2Config(), 5)
