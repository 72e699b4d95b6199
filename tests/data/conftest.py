"""A data object of conversations, for the tests of their batches and of their templates."""

import json

import pytest
from data.dialogues import BYTES, LINE

from llm_jax import config as configs
from llm_jax.data.dialogue import prepare_dialogues


@pytest.fixture
def made(tmp_path):
    """A data object of the given rows."""

    def make(rows, length=64, tokenizer=BYTES, workdir="run", writer=True, **changes):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "line.jinja").write_text(LINE)
        data = configs.DataConfig(format="dialogue", packing="first_fit", eval_fraction=0.0)
        values = {
            "inputs": (str(path),),
            "dialogue.template": str(tmp_path / "line.jinja"),
            **changes,
        }
        configs.override(data, values)
        return prepare_dialogues(
            data, tokenizer, str(tmp_path / workdir), length=length, writer=writer
        )

    return make
