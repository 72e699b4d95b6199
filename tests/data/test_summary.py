"""The numbers of a data report, on a corpus that can be counted by hand."""

import pytest

from llm_jax import tokenizers
from llm_jax.data import shards, summary
from llm_jax.data.documents import Document


def test_numbers_of_three_documents(tmp_path):
    tokenizer = tokenizers.train("char", ["abc"])
    docs = [Document(t, "x") for t in ("abcab", "zé", "a")]
    shards.prepare(docs, tokenizer, str(tmp_path / "x"), add_eos=False)
    tokens = shards.open_(str(tmp_path / "x"))
    found = summary.summarise(tokens, length=4)
    assert found.pop("tokens_per_second") > 0
    assert found == {
        "documents": 3,
        "characters": 8,
        "bytes": 9,
        "tokens": 8,
        "bytes_per_token": 9 / 8,
        "unknown_rate": 2 / 8,
        "tokens_per_document": 2.0,
        # abca b zé a, one a row; first-fit puts b and a beside zé.
        "utilisation": {"split": 1.0, "first_fit": 8 / 8, "pad": 8 / 16},
    }
    lengths, share = summary.share_by_length(tokens)
    assert dict(zip(lengths, share)) == pytest.approx(
        {1: 1 / 8, 2: 3 / 8, 3: 3 / 8, 4: 3 / 8, 5: 1, 6: 1}
    )
