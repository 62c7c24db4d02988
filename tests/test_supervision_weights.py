"""Spans to token weights on real tokenizers, trained here on invented text; and how the tags are shown."""

import io
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dive_fast.data.encoding import response_tokens
from dive_fast.errors import InputError
from dive_fast.supervision.lexicon import LexiconTagger
from dive_fast.supervision.show import render, render_html
from dive_fast.supervision.tagger import POLARITIES, Span
from dive_fast.supervision.weights import checked_spans, decisive_mask, token_weights

CORPUS = ["No pleural effusion or pneumothorax is seen.", "The heart is enlarged, the lungs are clear."] * 20


def byte_level(trim_offsets=True):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=["</s>"])
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def sentence_piece():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", bos_token="<s>")


def byte_fallback():
    """Llama's kind: SentencePiece words, unknown characters in bytes; here every letter is a token."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "byte_level": byte_level(),
    "byte_level_untrimmed": byte_level(False),
    "sentence_piece": sentence_piece(),
    "byte_fallback": byte_fallback(),
}
TEXTS = [
    "No pleural effusion or pneumothorax is seen.",
    "Caféeffusion: 5 µm opacité, naïve 🫁🫁 pneumothorax 🩻.",
    "No  pleural\n effusion .",
    "é",
    "",
]


def by_hand(text, offsets, spans):
    """The definition, character by character."""
    inside = {p for start, end, _ in spans for p in range(start, end)}
    return [any(p in inside for p in range(start, end)) for start, end in offsets]


def find(text, *phrases):
    return [Span(text.index(phrase), text.index(phrase) + len(phrase), phrase) for phrase in phrases]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_response_tokens_are_the_reports_own(name, text):
    tokenizer = TOKENIZERS[name]
    ids, offsets = response_tokens(tokenizer, text)
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    assert not {tokenizer.eos_token_id, tokenizer.bos_token_id} & set(ids)
    assert len(ids) == len(offsets)
    assert all(0 <= start <= end <= len(text) for start, end in offsets)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_phrase_of_several_tokens_is_weighted_whole_and_its_neighbours_are_not(name):
    text = TEXTS[0]
    ids, offsets = response_tokens(TOKENIZERS[name], text)
    mask = decisive_mask(offsets, find(text, "pleural effusion"))
    assert sum(mask) >= 2
    covered = {p for (start, end), decisive in zip(offsets, mask, strict=True) if decisive for p in range(start, end)}
    word = range(text.index("pleural"), text.index(" or"))
    assert set(word) - {text.index(" effusion")} <= covered <= {word[0] - 1, *word}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_mask_equals_the_definition_on_random_spans(name, text):
    _, offsets = response_tokens(TOKENIZERS[name], text)
    rng = random.Random(0)
    for _ in range(50 if text else 1):
        cuts = [sorted(rng.sample(range(len(text) + 1), 2)) for _ in range(rng.randint(0, 4)) if text]
        spans = [Span(start, end, "x") for start, end in cuts]
        assert decisive_mask(offsets, spans) == by_hand(text, offsets, spans)


def test_a_character_of_several_byte_tokens_counts_with_all_of_them():
    text = "a 🫁 b"
    for name in ("byte_level", "byte_level_untrimmed", "byte_fallback"):
        ids, offsets = response_tokens(TOKENIZERS[name], text)
        mask = decisive_mask(offsets, [Span(2, 3, "lung")])
        assert sum(mask) >= 4  # four bytes, none of them merged by training
        assert [offset for offset, decisive in zip(offsets, mask, strict=True) if not decisive][0][0] == 0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)), max_size=12),
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), max_size=6),
)
def test_mask_equals_the_definition_for_any_offsets(starts_and_widths, spans):
    offsets = [(start, start + width) for start, width in starts_and_widths]
    spans = [Span(start, start + width, "x") for start, width in spans]
    assert decisive_mask(offsets, spans) == by_hand("", offsets, spans)


def test_zero_width_tokens_never_count():
    assert decisive_mask([(3, 3), (2, 4), (0, 0)], [Span(0, 9, "x")]) == [False, True, False]


def test_weights_are_the_formula_with_eos_last():
    offsets, spans = [(0, 2), (2, 10), (10, 11)], [Span(3, 10, "x"), Span(4, 6, "y")]
    assert token_weights(offsets, spans, pathology_weight=2.0, eos_weight=4.0) == [1.0, 3.0, 1.0, 5.0]
    assert token_weights(offsets, spans, pathology_weight=0, eos_weight=0) == [1.0] * 4
    assert token_weights([], [], pathology_weight=2.0, eos_weight=0.5) == [1.5]
    assert all(type(w) is float for w in token_weights(offsets, spans, pathology_weight=0, eos_weight=0))


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "2", None, True])
@pytest.mark.parametrize("name", ["pathology_weight", "eos_weight"])
def test_a_bad_weight_is_named(name, value):
    with pytest.raises(InputError, match=name):
        token_weights([(0, 1)], [], **{"pathology_weight": 1.0, "eos_weight": 1.0, name: value})


def test_tokenizers_without_offsets_or_eos_are_refused():
    class Slow:
        is_fast, eos_token_id = False, 2

    with pytest.raises(InputError, match="fast tokenizer.*Slow"):
        response_tokens(Slow(), "x")
    without_eos = PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS["byte_level"].backend_tokenizer)
    with pytest.raises(InputError, match="EOS"):
        response_tokens(without_eos, "x")
    with pytest.raises(InputError, match="text"):
        response_tokens(TOKENIZERS["byte_level"], None)


def test_checked_spans_takes_tuples_lists_numpy_and_overlaps():
    answer = [[5, 8, ("Edema", "absent")], (np.int64(0), np.int64(4), "x"), (0, 6, "y")]
    spans = checked_spans(lambda text: iter(answer), "No edema")
    assert spans == [Span(0, 4, "x"), Span(0, 6, "y"), Span(5, 8, ("Edema", "absent"))]
    assert all(type(span) is Span and type(span.start) is int for span in spans)


@pytest.mark.parametrize("bad", [
    (0, 99, "x"), (-1, 3, "x"), (3, 3, "x"), (5, 2, "x"), (0.0, 3, "x"), (True, 3, "x"), ("0", 3, "x"), (0, 3), 7,
    "abc",     (0, 3, ["unhashable"]), (0, 3, ("a", ["b"])),
])  # fmt: skip
def test_checked_spans_shows_the_offending_span(bad):
    with pytest.raises(InputError) as error:
        checked_spans(lambda text: [(0, 2, "fine"), bad], "No edema")
    assert repr(bad) in str(error.value)


def test_checked_spans_refuses_what_is_no_tagger_and_no_sequence():
    with pytest.raises(InputError, match="callable"):
        checked_spans("lexicon", "No edema")
    with pytest.raises(InputError, match="sequence.*NoneType"):
        checked_spans(lambda text: None, "No edema")


REPORT = "Mild edema. No effusion. Possible pneumonia."


def console_text(shown, **options):
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=200, **options).print(shown)
    return out.getvalue()


def test_polarity_is_readable_without_colour():
    shown = console_text(render(REPORT, LexiconTagger()(REPORT)), no_color=True)
    assert "Mild [+edema]. No [-effusion]. Possible [?pneumonia]." in shown
    assert (
        "[+] present: Edema" in shown
        and "[-] absent: Pleural Effusion" in shown
        and "[?] uncertain: Pneumonia" in shown
    )
    assert "\x1b" not in shown


def test_colours_differ_by_polarity_and_a_users_class_is_shown():
    shown = render(REPORT, [(5, 10, ("Edema", "present")), (15, 23, "fluid")])
    assert "No [*effusion]" in shown.plain and "[*] other: fluid" in shown.plain
    reports = [render("edema", [(0, 5, label)]) for label in [*(("Edema", p) for p in POLARITIES), "fluid"]]
    assert len({str(report.spans[0].style) for report in reports}) == 4
    assert "\x1b[" in console_text(shown, force_terminal=True, color_system="standard")


def test_tokens_are_shown_as_the_loss_sees_them():
    tokenizer = TOKENIZERS["byte_level_untrimmed"]
    tokens = response_tokens(tokenizer, REPORT)
    spans = LexiconTagger()(REPORT)
    shown = render(REPORT, spans, tokens).plain
    weights = token_weights(tokens[1], spans, pathology_weight=1, eos_weight=1)
    assert "[- effusion]" in shown and "[EOS]" in shown
    assert f"{sum(w > 1 for w in weights[:-1])} of {len(weights) - 1} tokens up-weighted, and EOS" in shown
    body = shown.split("[EOS]")[0]
    for mark in ("[+", "[-", "[?", "]", "|"):
        body = body.replace(mark, "")
    assert body == REPORT
    assert "|" in shown.split("[?")[1].split("]")[0]  # a word of several tokens


def test_html_is_escaped_and_carries_the_class():
    text = 'No <b>effusion</b> & "mass"'
    start = text.index("effusion")
    mass = (len(text) - 5, len(text) - 1, 'a"b')
    page = render_html(text, [(start, start + 8, ("Pleural Effusion", "absent")), mass])
    assert page == (
        'No &lt;b&gt;<mark class="absent" title="Pleural Effusion, absent">effusion</mark>&lt;/b&gt; &amp; '
        '&quot;<mark class="other" title="a&quot;b">mass</mark>&quot;'
    )
    assert render_html("plain", []) == "plain" and render_html("", []) == ""


def test_overlapping_spans_share_a_mark():
    page = render_html("abcdef", [(0, 4, ("A", "present")), (2, 6, ("B", "absent"))])
    assert page == (
        '<mark class="present" title="A, present">ab</mark>'
        '<mark class="present" title="A, present; B, absent">cd</mark>'
        '<mark class="absent" title="B, absent">ef</mark>'
    )


def test_show_refuses_spans_of_another_text():
    for show in (render, render_html):
        with pytest.raises(InputError, match="99"):
            show("short", [(0, 99, "x")])
