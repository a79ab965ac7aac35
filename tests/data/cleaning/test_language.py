"""The language rule, with py3langid where it is installed."""

from __future__ import annotations

import builtins

import pytest
from cleaning_texts import SENTENCES

from grist_data.cleaning import CleanConfig, Cleaner
from grist_data.cleaning.language import UNKNOWN, excerpt, load_model


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("py3langid")
    return load_model()


@pytest.fixture(scope="module")
def classifier():
    langid = pytest.importorskip("py3langid.langid")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


@pytest.mark.parametrize("language", SENTENCES)
def test_languages_are_recognized(model, language):
    best, score = model.identify(SENTENCES[language])
    assert best == language
    assert 0.5 < score <= 1
    assert Cleaner(CleanConfig(languages=(language,))).reason(SENTENCES[language]) is None
    others = tuple(set(SENTENCES) - {language})
    assert Cleaner(CleanConfig(languages=others)).reason(SENTENCES[language]) == "other_language"


def test_score_is_inclusive(model):
    language, score = model.identify("a mill")
    assert 0 < score < 1
    for least, expected in ((score, None), (score * 1.0001, "uncertain_language")):
        assert Cleaner(CleanConfig(languages=(language,), min_language_score=least)).reason("a mill") == expected


@pytest.mark.parametrize("text", [*SENTENCES.values(), SENTENCES["en"].upper(), "def f(x):\n    return x", "12345 ++"])
def test_scores_are_those_of_py3langid(model, classifier, text):
    language, score = model.identify(text)
    expected_language, expected_score = classifier.classify(text)
    assert language == expected_language
    assert score == pytest.approx(expected_score, abs=1e-4)


@pytest.mark.parametrize("text", ["", " ", "\u2603"])
def test_nothing_to_go_by(model, text):
    assert model.identify(text) == (UNKNOWN, 0.0)
    assert Cleaner(CleanConfig(languages=("en",), min_language_score=0)).reason(text) == "other_language"


def test_a_long_text_is_judged_by_its_beginning_middle_and_end(model):
    assert excerpt("x" * 900) == "x" * 900
    long = "".join(chr(0x4E00 + k) for k in range(2000))
    assert excerpt(long) == "\n".join((long[:300], long[850:1150], long[1700:]))
    assert model.identify(SENTENCES["en"] * 5 + SENTENCES["de"] * 1000)[0] == "de"


def test_unknown_languages_are_refused(model):
    with pytest.raises(ValueError, match="languages has xx, zz, which py3langid does not know; it knows ace, af, am"):
        Cleaner(CleanConfig(languages=("zz", "en", "xx")))


def test_version_is_told(model):
    assert list(Cleaner(CleanConfig(languages=("en",))).versions()) == ["py3langid"]


def test_missing_package_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] in ("py3langid", "rensa"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    load_model.cache_clear()
    with pytest.raises(ImportError, match=r"languages needs py3langid: pip install gristmill\[clean\]"):
        Cleaner(CleanConfig(languages=("en",)))
    with pytest.raises(ImportError, match=r"near_duplicates needs rensa: pip install gristmill\[clean\]"):
        Cleaner(CleanConfig(near_duplicates=True))
