"""Worked examples whose numbers the wrong formula misses, and signatures that say how."""

import math
import sys

import numpy as np
import pytest

from llm_jax.eval import text_metrics as T


def test_perplexity_keeps_nats_and_bits_apart():
    p = [0.9, 0.5, 0.25]
    log_probs = np.log(p)
    assert T.perplexity(log_probs) == pytest.approx(2.0715, abs=5e-5)
    assert 2 ** T.mean_bits(log_probs) == pytest.approx(2.0715, abs=5e-5)
    assert T.perplexity_of(p) == pytest.approx((0.9 * 0.5 * 0.25) ** (-1 / 3))
    wrong = 2 ** -np.mean(log_probs)  # 2 to the nats
    assert wrong == pytest.approx(1.6566, abs=5e-5)
    assert T.perplexity([math.log(1 / 7)] * 3) == pytest.approx(7)  # uniform over 7
    assert T.perplexity_of([0.5, 0.0]) == math.inf
    with pytest.raises(ValueError, match="would be above 1"):
        T.perplexity([0.5])  # a probability where its logarithm belongs
    with pytest.raises(ValueError, match="are needed"):
        T.perplexity([])


def test_rouge_of_the_weather():
    found = T.rouge(
        ["it is very cold outside"], ["It is cold outside"], types=("rouge1", "rouge2", "rougeL")
    )
    # Swapping text and reference swaps P and R.
    assert found["rouge1"] == pytest.approx(
        {"precision": 0.8, "recall": 1.0, "f1": 0.889}, abs=5e-4
    )
    assert found["rouge2"]["f1"] == pytest.approx(0.571, abs=5e-4)
    assert found["rougeL"]["f1"] == pytest.approx(0.889, abs=5e-4)
    assert found["signature"].startswith("ROUGE|nrefs:1|agg:mean|case:lc|tok:a-z0-9|stem:no|")


def test_rouge_options():
    texts, references = ["the cats sat", "b"], [["a cat sitting", "two cats sat"], "b"]
    plain = T.rouge(texts, references, types=("rouge1", "rougeLsum"))
    assert plain["rouge1"]["f1"] == pytest.approx((2 / 3 + 1) / 2)  # of the better reference
    assert "nrefs:var" in plain["signature"]
    stemmed = T.rouge(["running cats"], ["run cat"], types=("rouge1",), stemmer=True)
    assert stemmed["rouge1"]["f1"] == 1.0 and "stem:porter" in stemmed["signature"]
    each = T.rouge_each(texts, references, types=("rouge1",))["rouge1"]
    assert each.shape == (2, 3) and each[:, 2].mean() == pytest.approx(plain["rouge1"]["f1"])
    two = T.rouge(["b c\na b"], ["a b\nb c"], types=("rougeL", "rougeLsum"))  # sentences swapped
    assert two["rougeLsum"]["f1"] == 1.0 > two["rougeL"]["f1"]
    with pytest.raises(ValueError, match="chrF"):
        T.rouge(["Привет"], ["Привет"])  # rouge-score alone says 0


def test_bleu_of_the_cat():
    found = T.bleu(["the cat sat on mat"], ["the cat is on the mat"])
    assert found["precisions"][:2] == pytest.approx([100 * 4 / 5, 100 * 1 / 4])
    assert found["precisions"][2:] == pytest.approx([100 / 2 / 3, 100 / 4 / 2])  # smoothed
    assert found["brevity_penalty"] == pytest.approx(0.8187, abs=5e-5)  # exp(1 - 6/5)
    assert found["score"] == pytest.approx(20.80, abs=5e-3)
    assert (found["text_length"], found["reference_length"]) == (5, 6)
    assert found["signature"].startswith(
        "BLEU|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:"
    )
    unsmoothed = T.bleu(["the cat sat on mat"], ["the cat is on the mat"], smooth="none")
    assert unsmoothed["score"] == 0.0 and "smooth:none" in unsmoothed["signature"]


def test_bleu_of_a_corpus_is_not_the_mean_of_its_sentences():
    texts = ["the cat sat on mat", "there are many dogs in the big garden behind our house"]
    references = ["the cat is on the mat", "there are many dogs in the big garden behind our house"]
    each = T.sentence_bleu(texts, references)
    assert each == pytest.approx([20.80, 100.0], abs=5e-3)
    whole = T.bleu(texts, references)["score"]
    # Matches and n-grams are added up over the corpus, and so are the lengths: 16 against 17.
    precisions = [15 / 16, 11 / 14, 9 / 12, 8 / 10]
    want = 100 * math.exp(1 - 17 / 16) * math.prod(precisions) ** 0.25
    assert whole == pytest.approx(want) and each.mean() < 61 < 76 < whole


def test_several_references():
    one = T.bleu(["a b c d e", "f g h i"], [["x y z u v", "a b c d e"], "f g h i"])
    assert one["score"] == pytest.approx(100.0) and "nrefs:var" in one["signature"]
    with pytest.raises(ValueError, match="2 texts and 1 references"):
        T.bleu(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="lists"):
        T.bleu("a", ["a"])
    with pytest.raises(ValueError, match="needs a reference"):
        T.chrf(["a"], [[]])


def test_chrf():
    found = T.chrf(["the cat"], ["the cat is"], word_order=2)
    assert found["score"] == pytest.approx(64.40, abs=5e-3)  # sacrebleu 2.6.0
    assert found["signature"].startswith("chrF2++|nrefs:1|case:mixed|eff:yes|nc:6|nw:2|space:no|")
    assert T.chrf(["same"], ["same"])["score"] == pytest.approx(100.0)
    assert T.chrf(["a"], ["a"])["signature"].startswith("chrF2|")


def test_answers_as_squad_compares_them():
    assert T.normalize_answer("  The  Eiffel-Tower, an icon! ") == "eiffeltower icon"
    assert T.normalize_answer("theory of a band") == "theory of band"  # words, not letters
    assert T.exact_match("The Beatles.", ["Queen", "beatles"]) == 1.0
    assert T.exact_match("Beatles band", "beatles") == 0.0
    # A word counts as often as both have it: to, be, to. As sets they would share two words.
    assert T.token_f1("to be or not to be", "to be to") == pytest.approx(2 * 3 / (6 + 3))
    assert T.token_f1("in Paris", ["London", "Paris"]) == pytest.approx(2 / 3)
    assert T.token_f1("the", "a") == 1.0 and T.token_f1("the", "cat") == 0.0


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ImportError, match=r"pip install 'llm_jax\[eval\]'"):
        T.bleu(["a"], ["a"])
