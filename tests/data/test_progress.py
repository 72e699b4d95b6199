"""Progress without a terminal is lines, and short work is silent."""

from llm_jax.data import progress


def test_a_log_gets_whole_lines(capsys):
    with progress.bar("tokenise", 200, "char") as bar:
        bar.delay = 0
        bar.update(200)
    err = capsys.readouterr().err
    assert err.startswith("tokenise: 100%") and err.endswith("\n")
    assert "\r" not in err and "200/200" in err


def test_work_of_less_than_a_second_says_nothing(capsys):
    with progress.bar("tokenise", 2, "char") as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""
