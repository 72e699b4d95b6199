"""Numbers that compare generated texts with references, and perplexity.

BLEU and chrF come from sacrebleu and ROUGE from rouge-score, since their numbers depend on
tokenisation, smoothing and stemming; each result carries the signature that says which.
"""

import collections
import importlib
import importlib.metadata
import math
import re
import string
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

References = Sequence[str | Sequence[str]]  # one or several for each text

ROUGE = ("rouge1", "rouge2", "rougeL")


def bleu(
    texts: Sequence[str],
    references: References,
    *,
    tokenize: str = "13a",
    smooth: str = "exp",
    lowercase: bool = False,
) -> dict[str, Any]:
    """Corpus BLEU (Papineni et al. 2002) as sacrebleu computes it (Post 2018).

        BLEU = 100 · min(1, exp(1 - r / c)) · (p1 p2 p3 p4)^(1/4)

    p_n is the share of the texts' n-grams that a reference has, counted over the whole corpus, c and
    r are the lengths of the texts and of the closest references. So the score of a corpus is not the
    mean of its sentences' scores (`sentence_bleu`). Where no n-gram of an order matches, `smooth` is
    put in its place: exp takes 1/2, 1/4, ... matches; none makes the whole score 0.

    Returns:
      score (0 to 100), precisions (4, 0 to 100), brevity_penalty, text_length, reference_length (in
      sacrebleu's tokens) and signature.

    Raises:
      ValueError: as many references as texts are needed, and one at least.
      ImportError: without sacrebleu.
    """
    metric = _sacrebleu().BLEU(tokenize=tokenize, smooth_method=smooth, lowercase=lowercase)
    found = metric.corpus_score(list(texts), _streams(texts, references))
    return {
        "score": found.score,
        "precisions": list(found.precisions),
        "brevity_penalty": found.bp,
        "text_length": found.sys_len,
        "reference_length": found.ref_len,
        "signature": f"BLEU|{metric.get_signature()}",
    }


def sentence_bleu(
    texts: Sequence[str], references: References, *, tokenize: str = "13a", lowercase: bool = False
) -> np.ndarray:
    """BLEU of each text alone [n], 0 to 100: exp smoothing, over the orders that the text has.

    For comparing texts with one another (a paired bootstrap); a corpus is reported by `bleu`.
    """
    metric = _sacrebleu().BLEU(tokenize=tokenize, lowercase=lowercase, effective_order=True)
    pairs = zip(texts, _several(texts, references), strict=True)
    return np.array([metric.sentence_score(text, refs).score for text, refs in pairs])


def chrf(
    texts: Sequence[str], references: References, *, word_order: int = 0, lowercase: bool = False
) -> dict[str, Any]:
    """chrF2: F-score (β = 2) of character n-grams up to 6, over the corpus (Popović 2015).

    word_order=2 also counts words and pairs of words: chrF++. Returns score (0 to 100), signature.
    """
    metric = _sacrebleu().CHRF(word_order=word_order, lowercase=lowercase)
    found = metric.corpus_score(list(texts), _streams(texts, references))
    return {"score": found.score, "signature": f"{found.name}|{metric.get_signature()}"}


def rouge(
    texts: Sequence[str],
    references: References,
    *,
    types: Sequence[str] = ROUGE,
    stemmer: bool = False,
) -> dict[str, Any]:
    """ROUGE (Lin 2004): means over texts of precision, recall and F1 of what text and reference share.

    rouge1, rouge2: words, pairs of words. rougeL: longest common subsequence. rougeLsum: the same
    by sentences, one a line, united. Of several references the one with the highest F1 counts.

    Returns:
      {type: {"precision", "recall", "f1"}, ..., "signature": str}; numbers from 0 to 1.

    Raises:
      ValueError: as `bleu`; or no reference has a letter from a to z or a digit, the only ones that
        rouge-score's tokeniser knows: other scripts would all score 0.
      ImportError: without rouge-score.
    """
    each = rouge_each(texts, references, types=types, stemmer=stemmer)
    out: dict[str, Any] = {
        kind: dict(zip(("precision", "recall", "f1"), map(float, scores.mean(axis=0)), strict=True))
        for kind, scores in each.items()
    }
    version = importlib.metadata.version("rouge-score")
    out["signature"] = (
        f"ROUGE|nrefs:{_count(references)}|agg:mean|case:lc|tok:a-z0-9|"
        f"stem:{'porter' if stemmer else 'no'}|sentences:newline|version:{version}"
    )
    return out


def rouge_each(
    texts: Sequence[str],
    references: References,
    *,
    types: Sequence[str] = ROUGE,
    stemmer: bool = False,
) -> dict[str, np.ndarray]:
    """{type: precision, recall and F1 of each text [n, 3]}; see `rouge`."""
    scorer = _import("rouge_score.rouge_scorer").RougeScorer(list(types), use_stemmer=stemmer)
    several = _several(texts, references)
    if not any(re.search("[a-z0-9]", ref.lower()) for refs in several for ref in refs):
        raise ValueError(
            "no reference has a letter from a to z or a digit, and rouge-score sees no others; use "
            "chrF for this script"
        )
    found = [scorer.score_multi(refs, text) for text, refs in zip(texts, several, strict=True)]
    return {kind: np.array([tuple(scores[kind]) for scores in found]) for kind in types}


def normalize_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no a / an / the, single spaces."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(text: str, references: str | Sequence[str]) -> float:
    """1.0 if the text equals one of the references after `normalize_answer`, else 0.0."""
    wanted = {normalize_answer(ref) for ref in _list(references)}
    return float(normalize_answer(text) in wanted)


def token_f1(text: str, references: str | Sequence[str]) -> float:
    """F1 of the words that text and reference share after `normalize_answer`, the best reference's.

    A word counts as often as both have it. If either side has no word, 1 if both have none, else 0.
    Source: Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions", section 6.1; empty answers as in 2.0.
    """
    return max(_token_f1(normalize_answer(text).split(), ref) for ref in _list(references))


def perplexity(log_probs: Iterable[float]) -> float:
    """exp(-mean log p) of tokens' log-probabilities in nats; the mean is over tokens.

        p = 0.9, 0.5, 0.25:   mean 0.7283 nats = 1.0507 bits,   e^0.7283 = 2^1.0507 = 2.0715

    (2^0.7283 = 1.6566 mixes the units.) Perplexity depends on the tokenizer; bits per byte do not.

    Raises:
      ValueError: no token, or a log-probability above 0.
    """
    nats = _mean_nats(log_probs)
    return math.exp(nats) if nats < 709 else math.inf


def mean_bits(log_probs: Iterable[float]) -> float:
    """-mean log2 p of tokens' log-probabilities in nats: bits a token; 2 to them is perplexity."""
    return _mean_nats(log_probs) / math.log(2)


def perplexity_of(probabilities: Iterable[float]) -> float:
    """Perplexity of tokens' probabilities: their geometric mean, inverted. Infinite with a 0."""
    p = np.asarray(list(probabilities), np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("probabilities have to lie in [0, 1]")
    return math.inf if (p == 0).any() else perplexity(np.log(p))


def _mean_nats(log_probs: Iterable[float]) -> float:
    values = np.asarray(list(log_probs), np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"log-probabilities of tokens [n] are needed, not {values.shape}")
    # Rounding may leave the log of a certain token a little above 0.
    if not (values <= 1e-4).all():
        raise ValueError(f"a log-probability of {values.max():.4g} nats would be above 1")
    return float(-values.mean())


def _token_f1(words: list[str], reference: str) -> float:
    wanted = normalize_answer(reference).split()
    if not words or not wanted:
        return float(words == wanted)
    shared = sum((collections.Counter(words) & collections.Counter(wanted)).values())
    return 2 * shared / (len(words) + len(wanted))


def _list(references: str | Sequence[str]) -> Sequence[str]:
    references = [references] if isinstance(references, str) else references
    if not references:
        raise ValueError("a text needs a reference")
    return references


def _several(texts: Sequence[str], references: References) -> list[list[str]]:
    """A list of references for each text."""
    if isinstance(texts, str) or len(texts) != len(references) or not len(texts):
        raise ValueError(
            f"{len(texts)} texts and {len(references)} references: lists of as many of both are "
            "needed, and one at least"
        )
    return [list(_list(refs)) for refs in references]


def _streams(texts: Sequence[str], references: References) -> list[list[str | None]]:
    """sacrebleu's layout: the first reference of every text, the second, ...; None where none is."""
    several = _several(texts, references)
    most = max(map(len, several))
    return [[refs[n] if n < len(refs) else None for refs in several] for n in range(most)]


def _count(references: References) -> str:
    counts = {len(_list(refs)) for refs in references}
    return str(counts.pop()) if len(counts) == 1 else "var"


def _sacrebleu() -> Any:
    return _import("sacrebleu")


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0].replace("_", "-")
        raise ImportError(f"this metric needs {package}: pip install 'llm_jax[eval]'") from None
