"""Demonstrations never leak, do not depend on order, and `nearest` is TF-IDF cosine as written down by hand."""

import math
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dive_fast.data import DemonstrationPool, Record, choose_demonstrations, generated_films
from dive_fast.errors import InputError

WAYS = ("random", "nearest", "fixed")


def record(i, report="r", prompt="p", patient=None):
    return Record(str(i), prompt, f"{report} {i}", meta={} if patient is None else {"patient_id": patient})


words = st.lists(st.sampled_from("cough fever pain tags normal heart".split()), min_size=1, max_size=4).map(" ".join)
# Few distinct reports, in several spellings, and few patients, so that leaks are common.
drawn_records = st.lists(
    st.builds(
        lambda id, prompt, report, patient: Record(
            str(id), prompt, report, meta={"patient_id": patient} if patient else {}
        ),
        st.integers(0, 40),
        words,
        st.sampled_from(["clear.", "Clear.", " clear.\n", "a mass.", "a  mass.", "effusion.", "old scar."]),
        st.sampled_from([None, "x", "y", "z"]),
    ),
    min_size=2,
    max_size=25,
    unique_by=lambda r: r.id,
)


@settings(max_examples=150, deadline=None)
@given(drawn_records, st.integers(0, 6), st.sampled_from(WAYS), st.integers(0, 3), st.data())
def test_never_leaks_and_never_depends_on_order(records, shots, how, seed, data):
    query = data.draw(st.sampled_from(records))
    outside = data.draw(st.booleans())
    pool = [r for r in records if r is not query] if outside else records

    def leaks(other):
        same_text = " ".join(other.report.lower().split()) == " ".join(query.report.lower().split())
        patients = other.meta.get("patient_id"), query.meta.get("patient_id")
        return other.id == query.id or same_text or (patients[0] == patients[1] and patients[0] is not None)

    usable = [r for r in pool if not leaks(r)]
    if len(usable) < shots:
        with pytest.raises(InputError, match="shots"):
            choose_demonstrations(query, pool, shots, how, seed=seed)
        return
    chosen = choose_demonstrations(query, pool, shots, how, seed=seed)
    assert len(chosen) == shots == len({r.id for r in chosen})
    assert all(r in usable for r in chosen)
    shuffled = data.draw(st.permutations(pool))
    other_order = DemonstrationPool(shuffled, shots, how, seed)
    for earlier in records[:3]:
        if sum(r.id != earlier.id for r in usable) > len(records):
            other_order.for_record(earlier)
    assert list(other_order.for_record(query)) == chosen


def test_random_differs_by_record_and_seed_and_covers_the_pool():
    pool = [record(i) for i in range(50)]
    queries = [record(f"q{i}") for i in range(200)]
    chooser = DemonstrationPool(pool, 4, "random", seed=0)
    chosen = [chooser.for_record(query) for query in queries]
    assert [chooser.for_record(query) for query in reversed(queries)] == chosen[::-1]
    counts = Counter(r.id for demos in chosen for r in demos)
    # 800 draws over 50 records: 16 each on average, standard deviation 3.8, of which 5 is one miss in a million.
    assert len(counts) == 50 and max(counts.values()) < 16 + 5 * 3.8
    assert [DemonstrationPool(pool, 4, "random", seed=1).for_record(query) for query in queries] != chosen


def cosine(query, text, texts):
    """TF-IDF cosine, from the definition."""
    bags = [Counter(re.findall(r"\w+", t.lower())) for t in texts]
    idf = {w: math.log(len(bags) / sum(w in bag for bag in bags)) for bag in bags for w in bag}
    a, b = ({w: n * idf.get(w, 0.0) for w, n in Counter(re.findall(r"\w+", t.lower())).items()} for t in (query, text))
    norms = math.sqrt(sum(x * x for x in a.values())) * math.sqrt(sum(x * x for x in b.values()))
    return sum(x * b.get(w, 0.0) for w, x in a.items()) / norms if norms else 0.0


def test_nearest_is_tfidf_cosine_most_similar_last():
    drawn = generated_films(60, seed=5)
    pool = [Record(r.id, f"Tags: {r.report} Describe it.", f"{r.report} {r.id}") for r in drawn]
    texts = [r.prompt for r in pool]
    chooser = DemonstrationPool(pool, 6, "nearest")
    for query in (Record("q", "Tags: round opacity, LEFT zone and unknown words.", "x"), pool[7], pool[31]):
        others = [r for r in pool if r.id != query.id]
        scores = {r.id: cosine(query.prompt, r.prompt, texts) for r in others}
        best = sorted(others, key=lambda r: (-round(scores[r.id], 12), r.id))[:6]
        chosen = chooser.for_record(query)
        assert list(chosen) == best[::-1]
        assert [scores[r.id] for r in chosen] == sorted(scores[r.id] for r in chosen)
    # No word in common: still the asked number, all at cosine 0.
    assert len(chooser.for_record(Record("z", "zebra", "x"))) == 6


def test_fixed_is_one_set_with_leaking_ones_replaced_in_place():
    pool = [record(i) for i in range(10)]
    chooser = DemonstrationPool(pool, 4, "fixed", seed=2)
    base = chooser.for_record(record("query"))
    assert chooser.for_record(record("other")) == base
    for place, member in enumerate(base):
        replaced = chooser.for_record(member)
        assert [a is b for a, b in zip(replaced, base, strict=True)] == [i != place for i in range(4)]
        assert replaced[place] not in base
    assert DemonstrationPool(pool, 4, "fixed", seed=3).for_record(record("query")) != base


@pytest.mark.parametrize("how", WAYS)
def test_no_shots_and_errors(how):
    pool = [record(i) for i in range(3)]
    assert DemonstrationPool(pool, 0, how).for_record(pool[0]) == ()
    assert DemonstrationPool([], 0, how).for_record(pool[0]) == ()
    with pytest.raises(InputError, match="shots: 4 demonstrations asked of a pool of 3"):
        DemonstrationPool(pool, 4, how)
    with pytest.raises(InputError, match="record '0' needs 3 demonstrations, only 2 of the pool's 3"):
        DemonstrationPool(pool, 3, how).for_record(pool[0])
    with pytest.raises(InputError, match="the id '1' occurs twice"):
        DemonstrationPool([*pool, record(1, "other")], 1, how)
    for shots in (-1, 1.5, True):
        with pytest.raises(InputError, match="shots: expected a whole number"):
            DemonstrationPool(pool, shots, how)


def test_unknown_way():
    with pytest.raises(InputError, match="demos: expected one of random, nearest, fixed, got 'closest'"):
        DemonstrationPool([record(1)], 1, "closest")


def test_fingerprint_follows_settings_and_content(tmp_path):
    pool = generated_films(5)
    base = DemonstrationPool(pool, 2, "random", 0).fingerprint
    assert DemonstrationPool(generated_films(5)[::-1], 2, "random", 0).fingerprint == base
    assert re.fullmatch("[0-9a-f]{64}", base)
    changed = Record(pool[0].id, pool[0].prompt, pool[0].report + " new", pool[0].images, pool[0].meta)
    film = pool[0].images[0].copy()
    film.putpixel((0, 0), 255 - film.getpixel((0, 0)))
    redrawn = Record(pool[0].id, pool[0].prompt, pool[0].report, (film,), pool[0].meta)
    moved = Record(pool[0].id, pool[0].prompt, pool[0].report, pool[0].images, {"patient_id": "else"})
    others = [
        DemonstrationPool(pool, 3, "random", 0),
        DemonstrationPool(pool, 2, "fixed", 0),
        DemonstrationPool(pool, 2, "random", 1),
        DemonstrationPool(pool[1:], 2, "random", 0),
        *(DemonstrationPool([other, *pool[1:]], 2, "random", 0) for other in (changed, redrawn, moved)),
    ]
    assert len({base, *(other.fingerprint for other in others)}) == len(others) + 1
    path = tmp_path / "film.png"
    film.save(path)
    on_disk = [Record("a", "p", "r", (str(path),))]
    before = DemonstrationPool(on_disk, 1).fingerprint
    pool[1].images[0].resize((32, 32)).save(path)
    assert DemonstrationPool(on_disk, 1).fingerprint != before


@pytest.mark.parametrize("blank", ["", "  ", None, float("nan")], ids=repr)
def test_records_without_a_patient_are_not_one_patient(blank):
    records = [Record(f"r{i}", f"p {i}", f"report {i}.", meta={"patient_id": blank}) for i in range(4)]
    assert len(choose_demonstrations(records[0], records, 3)) == 3
