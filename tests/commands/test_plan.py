"""bin/plan. Run: python -m pytest tests/commands/test_plan.py"""

import json

import pytest

from resilient_t5.commands.plan import TABLE_GIB, main
from tests.conftest import ROOT

CARDS = {"mt5-small-4gb": (4, "adamw"), "mt5-base-6gb": (6, "adamw"), "mt5-large-6gb": (6, "adafactor_in_backward")}


def planned(capsys, *argv):
    """What the command prints as JSON."""
    assert main([*map(str, argv), "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", CARDS)
def test_a_small_card_configuration_fits_its_card_as_it_is_set(name, capsys):
    """Parsed, and planned for the memory in its name; the hub is not asked for a model whose sizes are known."""
    gib, optimizer = CARDS[name]
    found = planned(capsys, "--config", ROOT / "configs" / f"{name}.yaml", "--hardware.memory_gib", gib)
    assert found["as_configured"]["fits"]
    assert found["as_configured"]["optimizer"] == optimizer
    assert found["rows"] == 32_768
    assert found["as_configured"]["needed_gib"] < found["usable_gib"] < gib


def test_mt5_base_on_six_gib_is_told_float32_adamw_without_checkpointing(capsys):
    """As text: the choice as settings that bin/train takes, the alternatives with their cost, the smallest card."""
    assert main(["--model.preset", "mt5-base", "--hardware.memory_gib", "6"]) == 0
    text = capsys.readouterr().out
    assert "choice --optim.name adamw --model.gradient_checkpointing false --batch.micro_tokens 2048" in text
    assert "248.6 M parameters over 32768 vocabulary rows (582.4 M over all 250112)" in text
    assert "smallest card in GiB" in text
    assert text.count("fits") + text.count("too large") >= 8


def test_the_table_holds_every_mt5_size_at_every_card(capsys):
    """Four sizes over active and all rows; the page in docs/ holds it as the command prints it."""
    assert main(["--table", "mt5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 4 * 2
    assert all(line.count("|") == len(TABLE_GIB) + 2 for line in lines)
    assert "\n".join(lines) in (ROOT / "docs" / "small-cards.md").read_text(encoding="utf-8")


def test_a_prepared_corpus_gives_its_rows_and_its_longest_example(capsys, tmp_path, tiny_config):
    """The settings allow 96 + 48 tokens; the store's longest is shorter, and its active vocabulary is the one counted."""
    from resilient_t5.commands.prepare import main as prepare

    store = tmp_path / "store"
    assert prepare(["--config", str(tiny_config), "--data.store", str(store)]) == 0
    capsys.readouterr()
    found = planned(capsys, "--config", tiny_config, "--data.store", store, "--hardware.memory_gib", 1)
    assert found["rows"] < 32_768
    assert 16 < found["source_tokens"] <= 96
    assert found["target_tokens"] <= 48


def test_layers_that_are_shared_fit_where_whole_ones_do_not(capsys):
    """mT5-XL with AdamW: no card of 24 GiB trains it alone, four do; each holds a quarter of the layers' states."""
    card = ("--model.preset", "mt5-xl", "--hardware.memory_gib", "24", "--optim.name", "adamw")
    alone = planned(capsys, *card)["as_configured"]
    shared = planned(capsys, *card, "--hardware.shard_layers", "true", "--processes", "4")
    assert not alone["fits"] and shared["as_configured"]["fits"]
    assert {choice["optimizer"] for choice in shared["choices"]} == {"adamw"}
    tables_gib = 2 * 4 * 2 * 32_768 * 2_048 / 2**30
    assert shared["as_configured"]["optimizer_gib"] - tables_gib == pytest.approx((alone["optimizer_gib"] - tables_gib) / 4)


def test_wrong_use_is_told(capsys):
    """No model, an unknown format, a hub name that is not here, cards that share nothing."""
    for argv, sign in (
        ([], "no model"),
        (["--model.preset", "mt5-base", "--format", "xml"], "--format"),
        (["--model.name_or_path", "nobody/never-there"], "not on this machine"),
        (["--model.preset", "mt5-base", "--processes", "2"], "--hardware.shard_layers"),
    ):
        assert main(argv) == 2
        assert sign in capsys.readouterr().err


def test_a_model_that_is_not_supported_is_not_said_to_fit(capsys, tmp_path):
    """ByT5 has the shape of a T5; the plan fails with the same error as the training, before it prints what fits."""
    config = {"model_type": "t5", "tokenizer_class": "ByT5Tokenizer", "vocab_size": 384}
    config |= {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["--model.name_or_path", str(tmp_path)]) == 65
    shown = capsys.readouterr()
    assert "ByT5 reads bytes instead of SentencePiece pieces" in shown.err
    assert shown.out == ""
