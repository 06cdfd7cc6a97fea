"""The model card and the code that it shows. Run: python -m pytest tests/training/entrypoints/test_model_card.py"""

import contextlib
import dataclasses
import io
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from resilient_t5.config.schema import Config, EvaluationConfig, ModelConfig, RunConfig
from resilient_t5.restoration.restoration_config import RestorationConfig
from resilient_t5.training.entrypoints.export import (
    CHINESE_EXAMPLE,
    ENGLISH_EXAMPLE,
    CardFacts,
    model_card,
    snippet,
)

DOCS = Path(__file__).parents[3] / "docs"
REPORT = {
    "bytes": 3000,
    "characters": 1000,
    "tokens": 700,
    "unknown_share": 0.002,
    "unknown_character_share": 0.0125,
    "unknown_characters": {"热": 9, "|": 4},
}
FACTS = CardFacts(
    which="best",
    record={"update": 1200, "loss": 1.5, "term_restoration": 0.4},
    before={"update": 0, "loss": 4.0, "term_restoration": 0.0},
    figures={"n": 321, "n_documents": 40, "term_rate": 0.4, "term_rate_low": 0.3, "term_rate_high": 0.5},
    report=REPORT,
    update=1200,
    target_tokens=9000,
    command="bin/train --config configs/mine.yaml --run.dir 'runs/my run'",
    license=None,
)
CONFIG = Config(run=RunConfig(dir="runs/my run"), evaluation=EvaluationConfig(restore_examples=150))


def card(facts=FACTS, config=CONFIG, usage=None):
    """The card as text."""
    return model_card(facts, config, usage or RestorationConfig())


def code_of(text):
    """The Python blocks of a page."""
    return [block.removeprefix("python\n") for block in text.split("```")[1::2] if block.startswith("python\n")]


@pytest.mark.parametrize("license", [None, "apache-2.0"])
@pytest.mark.parametrize("base", [None, "google/mt5-small"])
def test_the_front_matter_is_yaml_that_names_no_pipeline(license, base):
    """The hub reads it; the pipeline text2text-generation is gone from transformers 5."""
    config = dataclasses.replace(CONFIG, model=ModelConfig(name_or_path=base))
    text = card(dataclasses.replace(FACTS, license=license), config)
    opening, front, _ = text.split("---\n", 2)
    found = yaml.safe_load(front)
    assert opening == "" and "pipeline" not in text
    expected = {"library_name": "transformers", "tags": ["t5", "span-restoration"], "license": license, "base_model": base}
    assert found == {key: value for key, value in expected.items() if value is not None}


def test_the_card_says_how_its_figures_were_made_and_how_to_measure_them_again():
    """The update, the training command, and a command line that bin/evaluate takes."""
    text = card()
    assert "Measured at update 1,200" in text and FACTS.command in text
    assert "bin/evaluate 'runs/my run' --which best --examples 150\n" in text


def test_a_card_without_figures_claims_no_measurement():
    """Nothing was measured, so there is nothing to measure again."""
    text = card(dataclasses.replace(FACTS, figures={}))
    assert "No term restoration was measured" in text and "Measured at" not in text and "bin/evaluate" not in text
    assert FACTS.command in text


def test_the_card_tells_the_share_of_characters_without_a_piece():
    """As a row of the corpus table; a store of an older version has no such row."""
    assert "| characters without a piece, share | 0.0125 |" in card()
    older = {key: value for key, value in REPORT.items() if not key.startswith("unknown_character")}
    assert "without a piece" not in card(dataclasses.replace(FACTS, report=older))


@pytest.mark.parametrize("task", ["restore", "correct"])
def test_the_code_of_the_card_compiles(task):
    """One block of Python, which loads from its own directory."""
    (code,) = code_of(card(usage=RestorationConfig(task=task)))
    compile(code, "card", "exec")
    assert 'directory = "."' in code and ("<extra_id_0>" in code) == (task == "restore")


@pytest.mark.parametrize(("size", "example"), [(3000, CHINESE_EXAMPLE), (1020, ENGLISH_EXAMPLE)])
def test_the_example_is_in_the_script_of_the_corpus(size, example):
    """A corpus of three-byte characters gets the Chinese one."""
    assert code_of(card(dataclasses.replace(FACTS, report={**REPORT, "bytes": size}))) == [snippet(".", example)]


def test_the_documentation_shows_the_code_of_the_card():
    """docs/using-the-model.md holds it, with the quickstart's directory."""
    assert code_of((DOCS / "using-the-model.md").read_text(encoding="utf-8")) == [
        snippet("runs/quickstart/export/best", CHINESE_EXAMPLE)
    ]


class Spelled:
    """A tokenizer and a model in one, whose answer is given: only what the code does with the answer is looked at."""

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, text, return_tensors):
        return transformers.BatchEncoding({"input_ids": torch.zeros(1, 1, dtype=torch.long)})

    def generate(self, source):
        return source

    def decode(self, ids):
        return self.answer


@pytest.mark.parametrize(
    ("text", "answer", "filled"),
    [
        ("处方：<extra_id_0>；疗程", "<pad><extra_id_0>舍曲林<extra_id_1></s>", "处方：舍曲林；疗程"),
        ("<extra_id_0> and <extra_id_1>.", "<pad> <extra_id_0> fever <extra_id_1> gout</s><pad>", "fever and gout."),
        ("takes<extra_id_0> daily", "<pad><extra_id_0> aspirin 100 mg<extra_id_1></s>", "takes aspirin 100 mg daily"),
        ("a <extra_id_0> c <extra_id_1> e", "<pad><extra_id_1> d</s>", "a <extra_id_0> c d e"),
        ("a <extra_id_0>", "<pad><extra_id_0> <extra_id_1> x</s>", "a <extra_id_0>"),
        ("<extra_id_0><extra_id_10>", "<pad><extra_id_0>x<extra_id_10>y", "xy"),
        ("no gap", "<pad></s>", "no gap"),
        ('"quoted" \\d {x}\n<extra_id_0>', "<pad><extra_id_0> x</s>", '"quoted" \\d {x}\nx'),
    ],
)
def test_the_code_puts_each_answer_into_its_gap(text, answer, filled, monkeypatch):
    """Several gaps; one without an answer stays open; spaces are not doubled; everything else stays as it is."""
    for name in ("AutoTokenizer", "AutoModelForSeq2SeqLM"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", lambda directory: Spelled(answer))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(snippet("somewhere", text), "snippet", "exec"), {})
    assert printed.getvalue() == filled + "\n"
